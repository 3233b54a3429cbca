// Reads a detached CARv2 index with go-car, and prints each multihash and its offset.
package main

import (
	"bufio"
	"fmt"
	"os"

	"github.com/ipld/go-car/v2/index"
	"github.com/multiformats/go-multihash"
)

func main() {
	if err := list(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func list(path string) error {
	in, err := os.Open(path)
	if err != nil {
		return err
	}
	defer in.Close()
	idx, err := index.ReadFrom(bufio.NewReader(in))
	if err != nil {
		return err
	}
	all, ok := idx.(index.IterableIndex)
	if !ok {
		return fmt.Errorf("an index of codec %s is not iterable", idx.Codec())
	}
	out := bufio.NewWriter(os.Stdout)
	err = all.ForEach(func(mh multihash.Multihash, offset uint64) error {
		_, err := fmt.Fprintln(out, mh.HexString(), offset)
		return err
	})
	if err != nil {
		return err
	}
	return out.Flush()
}
