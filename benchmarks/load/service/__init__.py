"""What daily service costs: a rollout under load, admission and metrics, refusals, and progress events."""
