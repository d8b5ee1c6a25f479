// Receives callbacks of ccrun and verifies their raw bytes before it parses them. Uses only the standard library.
//
//	CLOUDRUN_CALLBACK_SECRET=… PORT=3000 go run receiver.go
package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"math"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"
)

const toleranceSeconds = 300
const maxBodyBytes = 4 << 20

func isGenuine(header http.Header, body []byte, secret string) bool {
	timestamp := header.Get("X-Webhook-Timestamp")
	seconds, err := strconv.ParseInt(timestamp, 10, 64)
	if err != nil || math.Abs(float64(time.Now().Unix()-seconds)) > toleranceSeconds {
		return false
	}
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write([]byte(timestamp + "."))
	mac.Write(body)
	expected := "sha256=" + hex.EncodeToString(mac.Sum(nil))
	return hmac.Equal([]byte(expected), []byte(header.Get("X-Webhook-Signature")))
}

func main() {
	secret := os.Getenv("CLOUDRUN_CALLBACK_SECRET")
	if secret == "" {
		log.Fatal("CLOUDRUN_CALLBACK_SECRET is not set")
	}
	http.HandleFunc("/", func(writer http.ResponseWriter, request *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(writer, request.Body, maxBodyBytes))
		if err != nil || !isGenuine(request.Header, body, secret) {
			http.Error(writer, "unauthorized", http.StatusUnauthorized)
			return
		}
		var outcome struct {
			TaskID string `json:"taskId"`
			Status string `json:"status"`
		}
		if err := json.Unmarshal(body, &outcome); err != nil {
			http.Error(writer, "not JSON", http.StatusBadRequest)
			return
		}
		// Respond first and process the outcome afterwards. The same outcome may be delivered twice.
		writer.Header().Set("Content-Type", "application/json")
		fmt.Fprint(writer, `{"received":true}`)
		fmt.Printf("Task %s is %s\n", outcome.TaskID, outcome.Status)
	})
	port := os.Getenv("PORT")
	if port == "" {
		port = "3000"
	}
	listener, err := net.Listen("tcp", ":"+port)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("listening on %d\n", listener.Addr().(*net.TCPAddr).Port)
	log.Fatal(http.Serve(listener, nil))
}
