"""``python -m torch_mtl_pyg`` prints the versions, the active backend and why it is active."""

from .backend import backend_info

if __name__ == "__main__":
    print(backend_info())
