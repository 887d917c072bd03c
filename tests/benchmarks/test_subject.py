import pytest
import torch

from benchmarks.support.subject import named_subject, subject_of_file


def test_a_file_with_a_model_and_data(model_file):
    subject = subject_of_file(model_file, train_images=40, val_images=None)
    assert (subject.name, subject.title, subject.measure) == ("own", "own", "accuracy (%)")
    data = subject.data(0)
    assert (len(data.train), len(data.val)) == (40, 32)
    assert subject.inputs(50).shape == (50, 32)
    assert torch.equal(subject.inputs(50)[32:], subject.inputs(18))
    assert not subject.model.training


def test_a_file_with_a_metric_and_a_loss(model_file):
    model_file.write_text(
        model_file.read_text()
        + "def metric(model): return 7.0\ndef loss(outputs, labels): return outputs.sum()\n"
    )
    subject = subject_of_file(model_file, train_images=40, val_images=None)
    assert subject.measure == "metric"
    assert subject.metric(subject.model) == 7.0
    assert subject.loss(torch.ones(3), None) == 3


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"own\.py has no model\(\); expected model\(\), data\(\) and metric\(\)"),
        ("def model(): pass", r"has no data\(\)"),
        ("def model(): return 3\ndef data(): pass", r"model\(\) gave a int, expected an nn.Module"),
        ("MODEL\ndef data(): return [1]", r"data\(\) gave list, expected \(train, val\)"),
        ("MODEL\ndef data(): return [], []", "got no batches; expected batches"),
        ("MODEL\ndef data(): return [torch.ones(2)], []", "got a Tensor; expected batches"),
        ("MODEL\ndef data(): return [({}, torch.ones(2))], []", "got a tuple of dict, Tensor;"),
        (
            "MODEL\ndef data(): return 2 * [[(torch.ones(4, 2), torch.ones(4))]]",
            r"labels of torch.float32 and shape \(1,\) have no accuracy.*expected metric\(model\)",
        ),
        (
            "import torch\nclass M(torch.nn.Module):\n def forward(self, x): return {'y': x}\n"
            "def model(): return M()\n"
            "def data(): return 2 * [[(torch.ones(4, 2), torch.ones(4))]]",
            "the model gave a dict, expected a tensor; wrap it",
        ),
    ],
)
def test_files_that_lack_something(tmp_path, text, message):
    own = "import torch\ndef model(): return torch.nn.Linear(2, 2)"
    (tmp_path / "own.py").write_text(text.replace("MODEL", own))
    with pytest.raises(ValueError, match=message):
        subject_of_file(tmp_path / "own.py", train_images=4, val_images=None)


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*nowhere\.py"):
        subject_of_file(tmp_path / "nowhere.py", train_images=4, val_images=None)


def test_seeds_draw_other_images_to_train_on_and_the_same_to_judge_by(folder):
    for name in ("train", "val"):  # as many classes as the network has
        for i in range(8):
            (folder / name / "red").parent.joinpath(f"red{i}").symlink_to(folder / name / "red")
    subject = named_subject("resnet20", None, folder, train_images=4, val_images=3, seed=0)
    first, other = subject.data(0), subject.data(1)
    assert not torch.equal(first.train.images, other.train.images)
    assert torch.equal(first.val.images, other.val.images)


def test_without_a_folder_there_are_noise_and_no_data():
    subject = named_subject("resnet20", None, None, train_images=4, val_images=None, seed=0)
    assert (subject.weights, subject.title, subject.data) == ("random", "random images", None)
    assert subject.inputs(2).shape == (2, 3, 32, 32)
