"""`gears saturn` as a process of its own: files in, one table out, and one line for what cannot be used."""
import numpy as np
import pytest
from anndata import read_h5ad
from forks import command, forked

from gears_nb.data.io import write_h5ad
from gears_nb.saturn.simulator import simulate_species


pytestmark = forked


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("species")
    made = simulate_species(n_cells=60, n_genes=120, n_programs=15, seed=0)
    for name, table in made.tables.items():
        write_h5ad(table, folder / f"{name}.h5ad")
        np.savez(folder / f"{name}.npz", gene=made.embeddings[name].genes.astype(str), vectors=made.embeddings[name].vectors)
    return folder


def saturn(home, *args):
    return command("saturn", *args, folder=home)


GIVEN = ("--species", "human=human.h5ad", "mouse=mouse.h5ad", "--embeddings", "human=human.npz", "mouse=mouse.npz")


def test_files_in_one_table_out(home):
    done = saturn(home, *GIVEN, "--transfer", "human", "mouse", "--profile", "smoke", "--set", "macrogenes=20", "--quiet", "--model", "model", "--out", "both.h5ad")
    assert done.returncode == 0, done.stderr
    assert "60 human, 60 mouse cells by 20 macrogenes: both.h5ad, model: model" in done.stdout and "human: 120 of 120 genes kept" in done.stdout
    both = read_h5ad(home / "both.h5ad")
    assert both.shape == (120, 20) and both.obsm["X_saturn"].shape == (120, 16) and (both.obs["from_human"].to_numpy()[60:] != "").all()
    assert (home / "model" / "saturn.json").is_file()


@pytest.mark.parametrize(("args", "words"), [
    (("--species", "human.h5ad", "mouse=mouse.h5ad", *GIVEN[3:]), "no NAME=FILE"), ((*GIVEN[:3], "--embeddings", "human=human.npz"), "mouse"),
    (("--species", "human=absent.h5ad", "mouse=mouse.h5ad", *GIVEN[3:]), "absent.h5ad"), ((*GIVEN, "--transfer", "human", "rat"), "rat"),
    ((*GIVEN, "--set", "triplets.minning=hard"), "triplets.mining"), ((*GIVEN, "--label-key", "celltype"), "celltype")])
def test_bad_input_is_one_line_and_writes_nothing(home, args, words):
    done = saturn(home, *args, "--profile", "smoke", "--quiet", "--out", "other.h5ad")
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1 and not (home / "other.h5ad").exists()


def test_help_teaches(home):
    text = saturn(home, "--help").stdout
    assert "--embeddings" in text and "example" in text and "X_saturn" in text
