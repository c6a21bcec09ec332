// amqp091-go, as its documentation shows it.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

var (
	wallStarted time.Time
	cpuStarted  float64
)

func must(err error) {
	if err != nil {
		log.Fatal("peer: ", err)
	}
}

func cpu() float64 {
	var u syscall.Rusage
	must(syscall.Getrusage(syscall.RUSAGE_SELF, &u))
	return float64(u.Utime.Sec+u.Stime.Sec) + float64(u.Utime.Usec+u.Stime.Usec)/1e6
}

func start() {
	cpuStarted = cpu()
	wallStarted = time.Now()
}

func rss() int {
	status, err := os.ReadFile("/proc/self/status")
	must(err)
	for _, line := range strings.Split(string(status), "\n") {
		if strings.HasPrefix(line, "VmHWM:") {
			kb, err := strconv.Atoi(strings.Fields(line)[1])
			must(err)
			return kb
		}
	}
	return 0
}

func report(count int, trips []float64) {
	seconds := time.Since(wallStarted).Seconds()
	out := map[string]interface{}{
		"messages": count,
		"seconds":  seconds,
		"cpu_us":   (cpu() - cpuStarted) / float64(count) * 1e6,
		"rss_kb":   rss(),
	}
	if trips != nil {
		sort.Float64s(trips)
		out["median_us"] = trips[len(trips)/2] * 1e6
	}
	line, err := json.Marshal(out)
	must(err)
	fmt.Println(string(line))
}

type sender struct {
	ch    *amqp.Channel
	queue string
	body  []byte
}

func (s sender) send() {
	must(s.ch.PublishWithContext(context.Background(), "", s.queue, true, false,
		amqp.Publishing{DeliveryMode: amqp.Persistent, Body: s.body}))
}

// Not by DeferredConfirmation: in 1.5.0 a confirm that comes before the
// publish has returned is lost to it, and a round trip waits for ever.
func (s sender) confirms(window int) chan amqp.Confirmation {
	must(s.ch.Confirm(false))
	return s.ch.NotifyPublish(make(chan amqp.Confirmation, window))
}

func await(confirms chan amqp.Confirmation) {
	if c, ok := <-confirms; !ok || !c.Ack {
		log.Fatal("peer: nacked")
	}
}

func publish(s sender, count, window int) {
	confirms := s.confirms(window)
	start()
	for i := 0; i < count; i++ {
		if i >= window {
			await(confirms)
		}
		s.send()
	}
	for i := 0; i < count && i < window; i++ {
		await(confirms)
	}
	report(count, nil)
}

func roundtrip(s sender, count int) {
	confirms := s.confirms(1)
	trips := make([]float64, count)
	start()
	for i := range trips {
		started := time.Now()
		s.send()
		await(confirms)
		trips[i] = time.Since(started).Seconds()
	}
	report(count, trips)
}

func consume(ch *amqp.Channel, queue string, size, count, prefetch int) {
	must(ch.Qos(prefetch, 0, false))
	start()
	deliveries, err := ch.Consume(queue, "", false, false, false, false, nil)
	must(err)
	left := count
	for d := range deliveries {
		if len(d.Body) != size {
			log.Fatal("peer: a body of another size")
		}
		must(d.Ack(false))
		left--
		if left == 0 {
			break
		}
	}
	if left > 0 {
		log.Fatal("peer: the channel closed")
	}
	_, err = ch.QueueDeclarePassive(queue, true, false, false, false, nil)
	must(err)
	report(count, nil)
}

func main() {
	if len(os.Args) != 6 {
		log.Fatal("usage: amqp091 MODE URL SIZE COUNT WINDOW")
	}
	number := func(i int) int {
		n, err := strconv.Atoi(os.Args[i])
		must(err)
		return n
	}
	mode, size, count, window := os.Args[1], number(3), number(4), number(5)
	queue := os.Getenv("BENCH_QUEUE")
	if queue == "" {
		queue = fmt.Sprintf("bench-%d", size)
	}
	conn, err := amqp.Dial(os.Args[2])
	must(err)
	ch, err := conn.Channel()
	must(err)
	_, err = ch.QueueDeclare(queue, true, false, false, false, nil)
	must(err)
	s := sender{ch, queue, bytes.Repeat([]byte("x"), size)}
	switch mode {
	case "publish":
		publish(s, count, window)
	case "roundtrip":
		roundtrip(s, count)
	case "consume":
		consume(ch, queue, size, count, window)
	default:
		log.Fatal("peer: unknown mode")
	}
	conn.Close()
}
