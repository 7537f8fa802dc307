"""Render the emoji that pocket's world is made of into one small atlas.

    npm pack @iconify-json/fluent-emoji-flat@1.2.6 && tar xzf iconify-json-fluent-emoji-flat-1.2.6.tgz
    python training/build_sprites.py package/icons.json

The emoji are Microsoft's Fluent Emoji (MIT licence, see tav_peft/pocket/LICENSES.md). resvg-py 0.5.0 draws them once,
here; neither is needed by the installed package.
"""

import io
import json
import sys
from pathlib import Path

import resvg_py
from PIL import Image

OBJECTS = {
    "rabbit": "rabbit",
    "panda": "panda",
    "fox": "fox",
    "tiger": "tiger",
    "elephant": "elephant",
    "penguin": "penguin",
    "pig": "pig",
    "duck": "duck",
    "frog": "frog",
    "car": "automobile",
    "bus": "bus",
    "tractor": "tractor",
    "man": "man-running",
    "robot": "robot",
    "astronaut": "astronaut",
    "watermelon": "watermelon",
}
SIZE = 96
HERE = Path(__file__).parent.parent / "tav_peft" / "pocket"


def draw(body: str, width: int, height: int) -> Image.Image:
    """Draw one icon's SVG body and crop it to what is not transparent."""
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    box = image.getchannel("A").getbbox()
    return image.crop(box)


def main(icons_file: str) -> None:
    """Write sprites.png (one row a sprite, left-aligned) and sprites.json (name -> [row, width, height])."""
    icons = json.loads(Path(icons_file).read_text())
    atlas = Image.new("RGBA", (SIZE, SIZE * len(OBJECTS)))
    index = {}
    for row, (name, icon) in enumerate(OBJECTS.items()):
        sprite = draw(icons["icons"][icon]["body"], icons["width"], icons["height"])
        atlas.paste(sprite, (0, row * SIZE))
        index[name] = [row * SIZE, sprite.width, sprite.height]
    atlas.save(HERE / "sprites.png", optimize=True)
    (HERE / "sprites.json").write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
