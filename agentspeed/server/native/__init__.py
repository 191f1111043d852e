"""`/v1/sessions`: sessions over HTTP as they are in the SDK, with forks, marks, leases and snapshots."""
