"""Users' cells on the C++ driver: printed as C++, compiled where they are used, kept on disk."""
