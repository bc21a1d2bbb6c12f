"""verify-layout: proof that the maths does not depend on the layout, on a shrunk twin of the user's own model."""
