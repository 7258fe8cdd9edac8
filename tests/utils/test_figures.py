"""Labels beside lines do not overlap."""

import numpy as np

from jaxpack.utils.figures import apart


def test_names_stay_near_the_ends_of_their_lines_and_apart():
    ends = np.array([0.0, 1.0, 2.0, 50.0, 100.0])
    placed = apart(ends, 10.0)
    np.testing.assert_allclose(placed, [-9.0, 1.0, 11.0, 50.0, 100.0])
