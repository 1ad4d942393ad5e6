"""Tiles of the SwiGLU kernels: the same for every width and architecture, for they wait for memory alone.

8 elements a thread: one 128-bit load of each bf16 half. (triton 3.7.1; budgets.json has what that takes.)
"""

BLOCK = 2048
THREADS = 256
