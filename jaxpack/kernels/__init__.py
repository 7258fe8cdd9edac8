"""Operations on arrays that the model is made of. They know shapes and dtypes, and nothing of models."""
