"""Small panels of curves: whole, and with numbers below the last of each column."""

from tdecomp.pictures.curves import small_multiples


def panels(largest):
    return {
        str(i): {"svd": ([0.2, 0.5, 0.9], [error, 0.3, 0.1], [True] * 3)}
        for i, error in enumerate(largest)
    }


def test_the_axis_reaches_the_largest_error_of_all_panels():
    figure = small_multiples(panels([0.5, 0.95, 0.7]), x_label="share", y_label="error")
    for axis in figure.axes:
        bottom, top = axis.get_ylim()
        assert bottom == 0
        assert top >= 0.95


def test_the_last_panel_of_each_column_has_numbers_below():
    figure = small_multiples(panels([0.5] * 5), x_label="share", y_label="error")
    numbered = [
        axis.xaxis.get_tick_params()["labelbottom"] for axis in figure.axes if axis.get_visible()
    ]
    assert numbered == [False, True, True, True, True]
