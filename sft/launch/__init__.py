"""`launch_training.sh`: options, plan, processes, the elastic agent, SLURM, the virtual environment."""
