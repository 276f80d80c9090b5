// A vCenter for tests: govmomi's simulator (Debian's golang-github-vmware-govmomi-dev) with its size from flags, and hooks
// beside /sdk for what a client cannot ask for.
//
// Prints "READY ADDRESS SHA256" when it serves, SHA256 being its certificate's in hexadecimal, and ends with SIGTERM or when its
// standard input ends.
//
//	POST /test/host?id=host-21&state=notResponding   runtime.connectionState of a host
//	POST /test/tag?id=dvportgroup-9&key=KEY          a tag of an entity
//	POST /test/status?code=503                       the next call to /sdk is answered with that status
//	POST /test/forget                                all sessions end: their cookies are no longer known
//	POST /test/cut                                   all connections of clients are closed
//	GET  /test/calls                                 how often each method was called, as JSON
package main

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"math/big"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"regexp"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// front stands before the simulator: it counts calls and lets sessions be forgotten.
type front struct {
	behind http.Handler

	mutex     sync.Mutex
	seen      map[string]bool
	forgotten map[string]bool
	calls     map[string]int
}

var methodName = regexp.MustCompile(`Body[^>]*>\s*<(?:\w+:)?(\w+)`)

func (f *front) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/sdk" {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		f.mutex.Lock()
		if name := methodName.FindSubmatch(body); name != nil {
			f.calls[string(name[1])]++
		}
		if cookie, err := r.Cookie(soap.SessionCookieName); err == nil {
			f.seen[cookie.Value] = true
			if f.forgotten[cookie.Value] {
				r.Header.Del("Cookie")
			}
		}
		f.mutex.Unlock()
	}
	f.behind.ServeHTTP(w, r)
}

func (f *front) forget(http.ResponseWriter, *http.Request) {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	for cookie := range f.seen {
		f.forgotten[cookie] = true
	}
}

func (f *front) countCalls(w http.ResponseWriter, _ *http.Request) {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	_ = json.NewEncoder(w).Encode(f.calls)
}

// update changes a property of the entity that the request names, so that filters tell of it.
func update(w http.ResponseWriter, r *http.Request, change types.PropertyChange) {
	kinds := map[string]string{"/test/host": "HostSystem", "/test/tag": "DistributedVirtualPortgroup"}
	ref := types.ManagedObjectReference{Type: kinds[r.URL.Path], Value: r.URL.Query().Get("id")}
	entity := simulator.Map.Get(ref)
	if entity == nil {
		http.Error(w, "no such object", http.StatusNotFound)
		return
	}
	simulator.Map.Update(entity, []types.PropertyChange{change})
}

// newCertificate makes a self-signed one with a key as a vCenter's. The simulator's own key is too short for today's clients.
func newCertificate() (tls.Certificate, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		Subject:      pkix.Name{CommonName: "vcenter.example"},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().AddDate(1, 0, 0),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

func main() {
	listen := flag.String("listen", "127.0.0.1:0", "address")
	user := flag.String("user", "user", "who may log in")
	password := flag.String("password", "pass", "with which password")
	instance := flag.String("instance", "dbed6e0c-bd88-4ef6-b594-21283e1c677f", "the vCenter's UUID")
	model := simulator.VPX()
	flag.IntVar(&model.Datacenter, "datacenters", 1, "")
	flag.IntVar(&model.Cluster, "clusters", 1, "for each datacenter")
	flag.IntVar(&model.ClusterHost, "cluster-hosts", 3, "for each cluster")
	flag.IntVar(&model.Host, "hosts", 1, "outside of clusters, for each datacenter")
	flag.IntVar(&model.Datastore, "datastores", 1, "for each datacenter")
	flag.IntVar(&model.Portgroup, "portgroups", 1, "distributed ones, for each datacenter")
	flag.IntVar(&model.Folder, "folders", 0, "that datacenters are put into")
	flag.IntVar(&model.Machine, "vms", 2, "for each cluster, and each host outside of one")
	flag.IntVar(&model.DelayConfig.Delay, "delay-ms", 0, "before each answer")
	verbose := flag.Bool("verbose", false, "print what the simulator logs")
	flag.Parse()
	if !*verbose {
		log.SetOutput(io.Discard)
	}

	model.ServiceContent.About.InstanceUuid = *instance
	if err := model.Create(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	defer model.Remove()
	service := model.Service
	certificate, err := newCertificate()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	service.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}}
	service.Listen = &url.URL{Host: *listen, User: url.UserPassword(*user, *password)}

	entry := &front{seen: map[string]bool{}, forgotten: map[string]bool{}, calls: map[string]int{}}
	service.HandleFunc("/test/forget", entry.forget)
	service.HandleFunc("/test/calls", entry.countCalls)
	service.HandleFunc("/test/host", func(w http.ResponseWriter, r *http.Request) {
		state := types.HostSystemConnectionState(r.URL.Query().Get("state"))
		update(w, r, types.PropertyChange{Name: "runtime.connectionState", Val: state})
	})
	service.HandleFunc("/test/tag", func(w http.ResponseWriter, r *http.Request) {
		tags := []types.Tag{{Key: r.URL.Query().Get("key")}}
		update(w, r, types.PropertyChange{Name: "tag", Val: tags})
	})
	service.HandleFunc("/test/status", func(w http.ResponseWriter, r *http.Request) {
		code, err := strconv.Atoi(r.URL.Query().Get("code"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		simulator.StatusSDK = code
	})
	cut := make(chan struct{}, 1)
	service.HandleFunc("/test/cut", func(http.ResponseWriter, *http.Request) { cut <- struct{}{} })

	server := service.NewServer()
	entry.behind = server.Config.Handler
	server.Config.Handler = entry
	fmt.Printf("READY %s %x\n", server.URL.Host, sha256.Sum256(server.Certificate().Raw))

	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		end <- syscall.SIGTERM
	}()
	for {
		select {
		case <-cut:
			server.CloseClientConnections()
		case <-end:
			// The process ends: to close the server would wait for long polls that nobody ends.
			return
		}
	}
}
