// Executes a TEMPLATE of a Modelfile as Ollama does, on conversations from standard input: JSON in, a JSON list of texts out.
//
// Ollama gives a template that names .Messages these, and .System with the texts of all system messages.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role    string
	Content string
}

func main() {
	var given struct {
		Template      string
		Conversations [][]*message
	}
	check(json.NewDecoder(os.Stdin).Decode(&given))
	parsed, err := template.New("").Option("missingkey=zero").Parse(given.Template)
	check(err)
	var texts []string
	for _, messages := range given.Conversations {
		var system []string
		for _, message := range messages {
			if message.Role == "system" {
				system = append(system, message.Content)
			}
		}
		var text strings.Builder
		values := map[string]any{"System": strings.Join(system, "\n\n"), "Messages": messages, "Response": ""}
		check(parsed.Execute(&text, values))
		texts = append(texts, text.String())
	}
	check(json.NewEncoder(os.Stdout).Encode(texts))
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
