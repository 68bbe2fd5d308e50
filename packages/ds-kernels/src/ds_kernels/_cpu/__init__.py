"""How numba kernels run on torch's own threads; see `launch` and `intrinsics`."""
