"""Version 1 of the control protocol. The ``*_pb2`` modules are generated when the package is built."""
