"""Write the hostile and the large report that `scripts/check_report.py` opens: python scripts/make_reports.py FOLDER"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "report"))

from hostile import HOSTILE, SCRIPTS, large_report, make_report

from tokenpo.report import write_html

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print(write_html(make_report([*HOSTILE, *SCRIPTS]), folder / "hostile.html"))
    print(write_html(make_report(SCRIPTS), folder / "scripts.html"))
    print(write_html(large_report(), folder / "large.html"))
