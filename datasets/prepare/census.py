"""Census-Income (KDD), UCI machine learning repository, CC BY 4.0: the classic benchmark of MMoE (Ma et al., KDD 2018).

census-income.data and census-income.test, or both with .gz: 42 columns without a header, `, ` between them, in the order of
census-income.names, with the instance weight as column 25 and the income as the last. Column names are those of the common MMoE examples.

Three labels: `label_income` (50000+), `label_never_married` (from the marital status) and `label_college` (an associate's degree or more,
from the education). Marital status, education and the instance weight, which the repository says to ignore, are dropped. For label_college
the recipe must leave out `hs_college` too, which says who is in college now.

`test.parquet` is the official test file. The log has no time: `valid.parquet` is every tenth row of the official train file. `row_id` is
the row's number in its file. Memory holds a block of text.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .text import Layout, Meter, Outputs, Progress, locate, parse_csv, read_parts

VALID_EVERY = 10
COLUMNS = (
    "age", "class_worker", "det_ind_code", "det_occ_code", "education", "wage_per_hour", "hs_college", "marital_stat", "major_ind_code",
    "major_occ_code", "race", "hisp_origin", "sex", "union_member", "unemp_reason", "full_or_part_emp", "capital_gains", "capital_losses",
    "stock_dividends", "tax_filer_stat", "region_prev_res", "state_prev_res", "det_hh_fam_stat", "det_hh_summ", "instance_weight",
    "mig_chg_msa", "mig_chg_reg", "mig_move_reg", "mig_same", "mig_prev_sunbelt", "num_emp", "fam_under_18", "country_father",
    "country_mother", "country_self", "citizenship", "own_or_self", "vet_question", "vet_benefits", "weeks_worked", "year", "income",
)  # fmt: skip
NUMBERS = (
    "age", "det_ind_code", "det_occ_code", "wage_per_hour", "capital_gains", "capital_losses", "stock_dividends", "num_emp", "own_or_self",
    "vet_benefits", "weeks_worked", "year",
)  # fmt: skip
TYPES = {name: pa.int64() if name in NUMBERS else pa.large_string() for name in COLUMNS if name != "instance_weight"}
LAYOUT = "UCI's: census-income.data and census-income.test, or census-income.data.gz and census-income.test.gz"

INCOMES = ("- 50000.", "50000+.")
NEVER_MARRIED = "Never married"
MARRIAGES = (
    NEVER_MARRIED, "Married-civilian spouse present", "Married-spouse absent", "Separated", "Divorced", "Widowed",
    "Married-A F spouse present",
)  # fmt: skip
DEGREES = (
    "Associates degree-occup /vocational", "Associates degree-academic program", "Bachelors degree(BA AB BS)",
    "Masters degree(MA MS MEng MEd MSW MBA)", "Prof school degree (MD DDS DVM LLB JD)", "Doctorate degree(PhD EdD)",
)  # fmt: skip
EDUCATIONS = (
    "Children", "Less than 1st grade", "1st 2nd 3rd or 4th grade", "5th or 6th grade", "7th and 8th grade", "9th grade", "10th grade",
    "11th grade", "12th grade no diploma", "High school graduate", "Some college but no degree", *DEGREES,
)  # fmt: skip


def prepare(source: Path, out: Path, progress: Progress) -> dict[str, int]:
    """Rows of each file written.

    Raises:
        InputError: names the file, and the line where one is broken.
    """
    suffix = "" if (source / "census-income.data").is_file() else ".gz"
    paths = locate([source], [f"census-income.data{suffix}", f"census-income.test{suffix}"], LAYOUT)
    meter = Meter(paths, progress)
    parse = partial(_parse, layout=Layout(COLUMNS, TYPES, quoted=False))
    with Outputs(out, ["train.parquet", "valid.parquet", "test.parquet"]) as outputs:
        for path, rest in zip(paths, ("train.parquet", "test.parquet"), strict=True):
            num_rows = 0
            for part in read_parts(path, parse, meter):
                row_id_N = np.arange(num_rows, num_rows + len(part.table))
                num_rows += len(part.table)
                table = part.table.add_column(0, "row_id", pa.array(row_id_N))
                held_out_N = (row_id_N % VALID_EVERY == VALID_EVERY - 1) & (rest == "train.parquet")
                outputs.write("valid.parquet", table.filter(pa.array(held_out_N)))
                outputs.write(rest, table.filter(pa.array(~held_out_N)))
    return outputs.counts


def _parse(lines: bytes, layout: Layout) -> pa.Table:
    table = parse_csv(lines, layout)
    for i, name in enumerate(table.column_names):
        if name not in NUMBERS:
            # Only the space after the comma: some values end in one.
            table = table.set_column(i, name, pc.utf8_ltrim(table[name], " "))
    never_married = _one_of(table, "marital_stat", MARRIAGES, (NEVER_MARRIED,))
    college = _one_of(table, "education", EDUCATIONS, DEGREES)
    income = _one_of(table, "income", INCOMES, INCOMES[1:])
    origin = table["hisp_origin"]
    known = pc.if_else(pc.equal(origin, "NA"), pa.scalar(None, origin.type), origin)
    table = table.set_column(table.column_names.index("hisp_origin"), "hisp_origin", known)
    table = table.drop_columns(["education", "marital_stat", "income"])
    for name, label in (("label_income", income), ("label_never_married", never_married), ("label_college", college)):
        table = table.append_column(name, label.cast(pa.int8()))
    return table


def _one_of(table: pa.Table, name: str, known: tuple[str, ...], chosen: tuple[str, ...]) -> pa.ChunkedArray:
    """Whether a text is one of `chosen`; ValueError for one that the log does not know."""
    values = pc.utf8_trim(table[name], " ")
    strange = values.filter(pc.invert(pc.is_in(values, value_set=pa.array(known, values.type))))
    if len(strange):
        raise ValueError(f"column '{name}' holds '{strange[0].as_py()}', which is none of the official values")
    return pc.is_in(values, value_set=pa.array(chosen, values.type))
