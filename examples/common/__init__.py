"""What the examples share: data, tasks, training, baselines, tables and figures."""
