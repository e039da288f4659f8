"""UCI Census-Income as its files are laid out, made of two of its lines."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

# A line of each kind as the repository has them: the last column ends in a dot, and some texts in a space.
LINES = [
    " 73, Not in universe, 0, 0, High school graduate, 0, Not in universe, Widowed, Not in universe or children, Not in universe, White,"
    " All other, Female, Not in universe, Not in universe, Not in labor force, 0, 0, 0, Nonfiler, Not in universe, Not in universe,"
    " Other Rel 18+ ever marr not in subfamily, Other relative of householder, 1700.09, ?, ?, ?, Not in universe under 1 year old, ?, 0,"
    " Not in universe, United-States, United-States, United-States, Native- Born in the United States, 0, Not in universe, 2, 0, 95,"
    " - 50000.",
    "58, Self-employed-not incorporated, 4, 34, Doctorate degree(PhD EdD), 0, Not in universe, Never married, Construction,"
    " Precision production craft & repair, Asian or Pacific Islander, NA, Male, Not in universe, Not in universe,"
    " Children or Armed Forces, 5178, 0, 150, Head of household, South, Arkansas, Householder, Householder, 1053.55, MSA to MSA,"
    " Same county, Same county, No, Yes, 1, Not in universe, Vietnam, ?, Vietnam, Foreign born- Not a citizen of U S , 2, Yes, 2, 52,"
    " 94, 50000+.",
]
NAMES = [
    "age", "class_worker", "det_ind_code", "det_occ_code", "education", "wage_per_hour", "hs_college", "marital_stat", "major_ind_code",
    "major_occ_code", "race", "hisp_origin", "sex", "union_member", "unemp_reason", "full_or_part_emp", "capital_gains", "capital_losses",
    "stock_dividends", "tax_filer_stat", "region_prev_res", "state_prev_res", "det_hh_fam_stat", "det_hh_summ", "instance_weight",
    "mig_chg_msa", "mig_chg_reg", "mig_move_reg", "mig_same", "mig_prev_sunbelt", "num_emp", "fam_under_18", "country_father",
    "country_mother", "country_self", "citizenship", "own_or_self", "vet_question", "vet_benefits", "weeks_worked", "year", "income",
]  # fmt: skip
EDUCATIONS = {
    "Children": 0, "Some college but no degree": 0, "Associates degree-occup /vocational": 1, "Associates degree-academic program": 1,
    "Bachelors degree(BA AB BS)": 1, "Prof school degree (MD DDS DVM LLB JD)": 1, "12th grade no diploma": 0,
}  # fmt: skip


def write(path: Path, num_rows: int, seed: int) -> None:
    rng = random.Random(seed)
    lines = []
    for _ in range(num_rows):
        line = rng.choice(LINES).split(",")
        line[0] = f" {rng.randrange(91)}"
        line[4] = f" {rng.choice(list(EDUCATIONS))}"
        lines.append(",".join(line) + "\n")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress("".join(lines).encode()) if path.suffix == ".gz" else "".join(lines).encode())
