"""squeeze roofline"""
