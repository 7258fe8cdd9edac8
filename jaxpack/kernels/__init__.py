"""Array operations that the model is built from. They know shapes and dtypes, and nothing of models.

Each operation is one public function with a plain-jnp reference beside it and derivatives of its own. Where there is a
Pallas kernel, `implementation` says what runs: "xla" is the reference, "pallas" is the kernel (interpreted on a CPU:
the same code, but slow), and None takes the kernel on an NVIDIA GPU and the reference elsewhere. A named implementation
never falls back: for sizes that a kernel cannot take, "pallas" raises an InputError, and None takes the reference.
"""
