"""From plans to tokens: what a step computes, what is drawn from it, and the machine it runs on."""
