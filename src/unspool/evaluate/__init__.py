"""Measurements: proofs of exactness here, quality metrics beside them."""
