"""The machine and its ranks: devices, GPUs, CPU speed, memory, out-of-memory errors, DTensors, collectives."""
