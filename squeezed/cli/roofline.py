"""squeeze roofline"""

from squeezed.analysis.command import roofline
from squeezed.cli import app

app.command()(roofline)
