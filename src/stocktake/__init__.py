"""Count the items in a warehouse bin from one photo; find where the inventory record is wrong."""

__version__ = "0.1.0"
