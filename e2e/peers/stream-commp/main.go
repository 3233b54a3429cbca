// Prints the piece commitment of parts of a file, as stream-commp computes it.
package main

import (
	"bufio"
	"fmt"
	"io"
	"os"

	commp "github.com/filecoin-project/go-fil-commp-hashhash"
)

func main() {
	if err := list(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// list reads lines of "offset length", and prints the commitment and the padded size of each.
func list(data, parts string) error {
	in, err := os.Open(data)
	if err != nil {
		return err
	}
	defer in.Close()
	lines, err := os.Open(parts)
	if err != nil {
		return err
	}
	defer lines.Close()
	out := bufio.NewWriter(os.Stdout)
	scanner := bufio.NewScanner(lines)
	for scanner.Scan() {
		var from, len int64
		if _, err := fmt.Sscan(scanner.Text(), &from, &len); err != nil {
			return err
		}
		calc := new(commp.Calc)
		if _, err := io.Copy(calc, io.NewSectionReader(in, from, len)); err != nil {
			return err
		}
		commitment, padded, err := calc.Digest()
		if err != nil {
			return fmt.Errorf("%d bytes: %w", len, err)
		}
		fmt.Fprintf(out, "%x %d\n", commitment, padded)
	}
	if err := scanner.Err(); err != nil {
		return err
	}
	return out.Flush()
}
