"""agentspeed under agent frameworks: one module for each, over the sessions that their message lists find."""
