"""What the compiler made of the inner loops: `python -m analysis BUILD_DIR`, from native/, prints each beside its bound."""
