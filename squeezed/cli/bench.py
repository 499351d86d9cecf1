"""squeeze bench"""
