"""Your own pictures, a worked example: a folder of 5,000 faces, and the preview trained on it.

    python benchmarks/own_pictures.py [FOLDER]

Draws the faces into the folder, trains on them (14 minutes of one core) and samples new faces into
outputs/own_pictures/. Run again after a stop, it resumes. Your own pictures need only the last two
lines of main().
"""

import os
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ddpm  # noqa: E402

COUNT, SIZE = 5000, 64
# not outputs/own_pictures itself: that is where the run puts its samples
FOLDER = ddpm.OUTPUTS / 'own_pictures/faces'
SETTINGS = dict(
    checkpoint_path='checkpoints/own_pictures',
    num_time_steps=1000,  # with PREVIEW's 500 samples of bright pictures are too dark
    num_epochs=60,
    batch_size=12,
    lr=5e-3,
    beta2=0.95,
    sample_every=10,
    seed=0,
)


def face(number):
    """A round face with two eyes on a plain ground; it smiles, or frowns, or is astonished."""
    rng = random.Random(number)
    s = 256  # drawn large and made small, so that edges are smooth
    hue = rng.randrange(360)
    ground = f'hsv({(hue + rng.randrange(120, 240)) % 360}, 60%, 35%)'
    picture = Image.new('RGB', (s, s), ground)
    draw = ImageDraw.Draw(picture)
    r = rng.uniform(0.32, 0.44) * s
    x, y = (s / 2 + rng.uniform(-1, 1) * (s / 2 - r) for _ in 'xy')

    def ellipse(cx, cy, rx, ry, colour):
        cx, cy, rx, ry = x + cx * r, y + cy * r, rx * r, ry * r
        draw.ellipse((cx - rx, cy - ry, cx + rx, cy + ry), colour)

    ellipse(0, 0, 1, 1, f'hsv({hue}, 70%, 95%)')
    for side in (-0.38, 0.38):
        ellipse(side, -0.25, 0.22, 0.27, 'white')
        ellipse(side, -0.22, 0.11, 0.14, 'black')
    mouth, width = rng.choice(['smile', 'frown', 'oh']), round(0.13 * r)
    if mouth == 'oh':
        ellipse(0, 0.5, 0.17, 0.22, 'black')
    else:
        top, angles = (0.0, (20, 160)) if mouth == 'smile' else (0.4, (200, 340))
        box = x - 0.5 * r, y + (top - 0.2) * r, x + 0.5 * r, y + (top + 0.7) * r
        draw.arc(box, *angles, 'black', width)
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def draw_faces(folder):
    """Draws the missing ones; an interrupted one leaves no picture that could be trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in tqdm(range(COUNT), 'Drawing faces', ncols=79):
        path = folder / f'{number:04d}.png'
        if not path.exists():
            part = folder / f'.{path.name}'  # hidden files are not trained on
            face(number).save(part)
            os.replace(part, path)


def main(folder=FOLDER):
    draw_faces(Path(folder))
    ddpm.train(**{**ddpm.PREVIEW, **SETTINGS, 'dataset': folder})
    ddpm.inference(SETTINGS['checkpoint_path'], seed=0)


if __name__ == '__main__':
    with ddpm.errors_in_one_line():
        main(*sys.argv[1:2])
