"""The program of `launch_training.sh`: options, plan, processes, agent, exit codes, SLURM, virtual environment."""
