"""What the machine is and how ranks talk: GPUs, CPU, memory, out-of-memory errors, DTensors, collectives."""
