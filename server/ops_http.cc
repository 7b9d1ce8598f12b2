// SPDX-License-Identifier: Apache-2.0
#include "server/ops_http.h"

#include <civetweb.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <utility>

#include "absl/strings/numbers.h"
#include "base/error.h"
#include "base/status.h"
#include "server/host_port.h"

namespace gradwire {
namespace {

int Answer(mg_connection* connection, int code, const char* meaning,
           const std::string& type, const std::string& body) {
  mg_printf(connection,
            "HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %zu\r\n"
            "Cache-Control: no-store\r\nConnection: close\r\n\r\n",
            code, meaning, type.c_str(), body.size());
  mg_write(connection, body.data(), body.size());
  return code;
}

constexpr char kText[] = "text/plain; charset=utf-8";

}  // namespace

absl::StatusOr<std::unique_ptr<OpsHttp>> OpsHttp::Start(
    const std::string& address, Handlers handlers) {
  GW_ASSIGN_OR_RETURN(HostPort where, ParseHostPort(address));
  std::unique_ptr<OpsHttp> http(new OpsHttp);
  http->handlers_ = std::move(handlers);
  const std::string host = where.host == "localhost" ? "127.0.0.1" : where.host;
  const std::string ports = host + ":" + std::to_string(where.port);
  // Nothing is served from disk: there is no document root.
  const char* options[] = {"listening_ports", ports.c_str(),
                           // A connection that asks for nothing holds one
                           // until its time is over.
                           "num_threads", "16", "request_timeout_ms", "1000",
                           "enable_directory_listing", "no", nullptr};
  mg_callbacks callbacks;
  std::memset(&callbacks, 0, sizeof(callbacks));
  callbacks.log_message = [](const mg_connection*, const char*) { return 1; };
  mg_init_library(0);
  http->context_ = mg_start(&callbacks, http.get(), options);
  if (http->context_ == nullptr) {
    return ErrorBuilder(absl::StatusCode::kUnavailable, "PORT_TAKEN")
        .With("value", address)
        .Message("Cannot listen on " + address +
                 ": the port is taken, or not this machine's.");
  }
  mg_server_port bound[4];
  std::memset(bound, 0, sizeof(bound));
  mg_get_server_ports(http->context_, 4, bound);
  http->address_ = host + ":" + std::to_string(bound[0].port);
  mg_set_request_handler(http->context_, "/", &OpsHttp::Handle, http.get());
  return http;
}

OpsHttp::~OpsHttp() {
  if (context_ == nullptr) return;
  // civetweb looks whether it shall stop between connections, and every other
  // second: a connection spares the wait.
  std::atomic<bool> stopped{false};
  std::thread stopper([&] {
    mg_stop(context_);
    stopped = true;
  });
  while (!stopped) {
    char error[256];
    const auto where = ParseHostPort(address_);
    mg_connection* knock = mg_connect_client(where->host.c_str(), where->port,
                                             0, error, sizeof(error));
    if (knock != nullptr) mg_close_connection(knock);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  stopper.join();
}

int OpsHttp::Handle(mg_connection* connection, void* self) {
  const Handlers& handlers = static_cast<OpsHttp*>(self)->handlers_;
  const mg_request_info* request = mg_get_request_info(connection);
  const std::string path = request->local_uri;
  const std::string method = request->request_method;
  if (method != "GET" && method != "HEAD") {
    return Answer(connection, 405, "Method Not Allowed", kText, "use GET\n");
  }
  if (path == "/livez") return Answer(connection, 200, "OK", kText, "ok\n");
  if (path == "/readyz" || path == "/startupz") {
    const std::vector<std::string> failed = handlers.failed_checks();
    if (failed.empty()) return Answer(connection, 200, "OK", kText, "ok\n");
    std::string body;
    for (const std::string& check : failed) body += "failed: " + check + "\n";
    return Answer(connection, 503, "Service Unavailable", kText, body);
  }
  if (path == "/metrics") {
    return Answer(connection, 200, "OK", "text/plain; version=0.0.4",
                  handlers.metrics());
  }
  return Answer(connection, 404, "Not Found", kText,
                "there are /livez, /readyz, /startupz and /metrics\n");
}

}  // namespace gradwire
