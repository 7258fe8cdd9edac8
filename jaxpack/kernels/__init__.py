"""Operations on arrays that the model is made of. They know shapes and dtypes, and nothing of models.

Each is one public function with a plain-jnp reference beside it and derivatives of its own. Where there is a Pallas
kernel, `implementation` says what runs: "xla" is the reference, "pallas" the kernel (interpreted on a CPU: the same,
but slow), and None takes the kernel on an NVIDIA GPU and the reference elsewhere. What is named never falls back: for
sizes that a kernel cannot take, "pallas" is refused, and None takes the reference.
"""
