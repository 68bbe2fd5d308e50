"""Operations, one folder each: `reference.py` is the specification, `op.py` the public function, the rest backends."""
