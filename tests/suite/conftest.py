"""A small data set in LOVEU-TGVE-2023's layout, drawn by pocket: its table and its folders of frames."""

import csv

import pytest
from PIL import Image

from tav_peft.suite.loveu import CAPTION, COLUMNS, FRAMES, NAME
from tav_peft.suite.pocket_cases import pocket_cases

SETS = {"DAVIS_480p": (0, 12), "youtube_480p": (3,)}  # which of pocket's cases stand in which set


@pytest.fixture(scope="session")
def loveu(tmp_path_factory):
    folder, cases = tmp_path_factory.mktemp("loveu"), pocket_cases()
    with (folder / "LOVEU-TGVE-2023_Dataset.csv").open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file)
        table.writerow([NAME, CAPTION, *COLUMNS.values()])
        for title, numbers in SETS.items():
            table.writerow([f"{title} Videos:", "", "", "", "", ""])
            for case in (cases[number] for number in numbers):
                table.writerow([case.name, case.caption, *(case.prompts[kind] for kind in COLUMNS)])
                place = folder / title / FRAMES / case.name
                place.mkdir(parents=True)
                for number, frame in enumerate(case.clip().pixels):
                    Image.fromarray(frame).resize((480, 480)).save(place / f"{number:05d}.jpg", quality=95)
            table.writerow([""] * 6)
    return folder
