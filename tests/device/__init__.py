"""What only the device shows: on CUDA, or with DEVICE=cpu to rehearse (launch/gpu_check.sh)."""
