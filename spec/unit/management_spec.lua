-- moonrabbit.management against a server that answers what it is told, and its pure parts.
local management = require "moonrabbit.management"
local moonrabbit = require "moonrabbit"
local native = require "moonrabbit.runtime.native"
local http_server = require "support.http_server"

local response = http_server.response

describe("moonrabbit.management", function()
  local server

  after_each(function()
    if server then server.stop() end
    server = nil
  end)

  -- A client of a server that answers every request with these bytes.
  local function client(bytes, opts)
    server = http_server.start(type(bytes) == "function" and bytes or function() return bytes end)
    local all = { uri = server.uri, timeout = 5 }
    for key, value in pairs(opts or {}) do all[key] = value end
    return management.new(all)
  end

  describe("options", function()
    it("that are wrong throw, naming them and this line", function()
      for _, case in ipairs {
        { "amqp://localhost", "must start with http" },
        { "http://", "valid host" },
        { "http://guest:a/b@host", "valid host" },
        { "http://host:0", "valid host" },
        { "http://host:99999", "valid host" },
        { "http://host/?x=y", "percent%-encode" },
        { { tls = {} }, "needs an https" },
        { { uri = "https://host", tls = { verfy = false } }, "did you mean 'verify'" },
        { { usr = "x" }, "did you mean 'user'" },
        { { max_body = 0 }, "'max_body'" },
        { { runtime = "none" }, "no runtime 'none'" },
        { 7, "options must be a table" },
      } do
        local ok, err = pcall(function() management.new(case[1]) end)
        assert.is_false(ok)
        assert.matches(case[2], err)
        assert.matches("management_spec", err)
      end
    end)

    it("never quote the password", function()
      local _, err = pcall(management.new, "http://guest:sesame open@host")
      assert.not_matches("sesame", err)
      assert.not_matches("sesame", tostring(management.new "http://guest:sesame@host"))
    end)

    it("say where it is", function()
      assert.equal("localhost:15672", management.new().endpoint)
      assert.equal("host:15671", management.new("https://host").endpoint)
      assert.equal("[::1]:8080", management.new("http://[::1]:8080/").endpoint)
    end)

    it("that its functions take are checked", function()
      local api = management.new()
      assert.has_error(function() api:queue("/") end)
      assert.has_error(function() api:set_policy("/", "p", { pattern = "x" }) end)
      assert.has_error(function() api:set_policy("/", "p", { pattern = "x", definition = {}, apply = "all" }) end)
      assert.has_error(function() api:mirror("/", "p", { pattern = "x", mode = "exactly" }) end)
      assert.has_error(function() api:mirror("/", "p", { pattern = "x", mode = "nodes" }) end)
      assert.has_error(function() api:mirror("/", "p", { pattern = "x", count = 2 }) end)
      assert.has_error(function() api:set_federation_upstream("/", "u", {}) end)
      assert.has_error(function() api:set_shovel("/", "s", { ["src-uri"] = "amqp://" }) end)
      assert.has_error(function() api:set_parameter("c", "/", "n", print) end)
    end)
  end)

  describe("a request", function()
    it("carries credentials, and names percent-encoded", function()
      local api = client(response(200, "{}"), { user = "böb", password = "p:w" })
      assert(api:queue("a/b", "c d%"))
      assert.equal("/api/queues/a%2Fb/c%20d%25", server.requests[1].target)
      assert.equal("Basic YsO2YjpwOnc=", server.requests[1].headers.authorization)
      assert.equal("127.0.0.1:" .. server.port, server.requests[1].headers.host)
    end)

    it("takes the URI's prefix, decoded password, and a token", function()
      server = http_server.start(function() return response(200, "{}") end)
      local api = management.new("http://u%40:p%2F@127.0.0.1:" .. server.port .. "/rabbit/")
      assert(api:overview())
      assert.equal("/rabbit/api/overview", server.requests[1].target)
      assert.equal("Basic dUA6cC8=", server.requests[1].headers.authorization)
      api = management.new { uri = "http://127.0.0.1:" .. server.port, token = "t0k" }
      assert(api:overview())
      assert.equal("Bearer t0k", server.requests[2].headers.authorization)
    end)

    it("asks the password function each time", function()
      local n = 0
      local api = client(response(200, "[]"), { password = function()
        n = n + 1
        if n > 1 then return nil, "the vault is closed" end
        return "one"
      end })
      assert(api:nodes())
      local _, err = api:nodes()
      assert.equal("auth", err.kind)
      assert.matches("vault", err.message)
    end)

    it("that changes something sends JSON", function()
      local api = client("HTTP/1.1 204 No Content\r\n\r\n")
      assert.is_true(api:mirror("/", "two", { pattern = "^q", mode = "exactly", count = 2 }))
      local body = require("cjson").decode(server.requests[1].body)
      assert.equal("PUT", server.requests[1].method)
      assert.equal("/api/policies/%2F/two", server.requests[1].target)
      assert.same({ ["ha-mode"] = "exactly", ["ha-params"] = 2, ["ha-sync-mode"] = "automatic" }, body.definition)
      assert.equal("queues", body["apply-to"])
    end)

    it("cannot be split by what stands in a header", function()
      local api = client("HTTP/1.1 204 No Content\r\n\r\n")
      assert(api:close_connection("a -> b", "because\r\nx-evil: 1"))
      assert.equal("because  x-evil: 1", server.requests[1].headers["x-reason"])
      assert.is_nil(server.requests[1].headers["x-evil"])
    end)

    it("leaves the loop to others, and works in a task", function()
      local api = client(function(_, peer)
        native.spawn(function()
          peer:write "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n["
          native.sleep(0)
          peer:write "{}]"
        end)
      end)
      local turns, done = 0, false
      local nodes = native.run(function()
        native.spawn(function()
          while not done do
            turns = turns + 1
            native.sleep(0)
          end
        end)
        local found = assert(api:nodes())
        done = true
        return found
      end)
      assert.equal(1, #nodes)
      assert.truthy(turns > 0)
    end)

    it("closes its connection when its task is cancelled", function()
      local api = client(function() end)
      local ended = false
      local task = native.spawn(function()
        api:nodes()
        ended = true
      end)
      while #server.requests == 0 do native.sleep(0.001) end
      native.cancel(task)
      assert.is_nil(server.clients[1]:read(10)) -- the end
      assert.is_false(ended)
    end)
  end)

  describe("an answer", function()
    it("may come in chunks, page by page, and with nulls", function()
      local page = 0
      local api = client(function()
        page = page + 1
        local body = page == 1 and '{"items":[{"name":"a","n":1,"x":null}],"page_count":2}'
          or '{"items":[{"name":"b"}],"page_count":2}'
        return ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n"):format(
          body:sub(1, 5), #body - 5, body:sub(6))
      end)
      assert.same({ { name = "a", n = 1 }, { name = "b" } }, api:queues { vhost = "/", columns = { "name" } })
      assert.matches("columns=name&page=1&page_size=500", server.requests[1].target)
      assert.matches("page=2", server.requests[2].target)
    end)

    it("may follow a 100, and may end with the connection", function()
      local api = client "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 200 OK\r\n\r\n[]"
      assert.same({}, api:nodes())
    end)

    local function fails(bytes, kind, pattern, opts)
      local api = client(bytes, opts)
      local value, err = api:nodes()
      assert.is_nil(value)
      assert.equal(kind, err.kind)
      assert.matches(pattern, err.message)
      assert.equal(api.endpoint, err.endpoint)
      server.stop()
      return err
    end

    it("that refuses has its reason and code", function()
      local err = fails(response(401, '{"error":"not_authorised","reason":"Login failed"}'), "auth", "Login failed")
      assert.equal(401, err.code)
      assert.is_false(err.temporary)
      err = fails(response(403, "{}"), "auth", "refuses this to user 'guest'")
      assert.equal(403, err.code)
      err = fails(response(404, "gone"), "http", "no such thing")
      assert.is_false(err.temporary)
      err = fails(response(503, ""), "http", "refuses")
      assert.is_true(err.temporary)
    end)

    it("is not followed elsewhere", function()
      local err = fails(response(302, "", "location: http://127.0.0.1:1/\r\n"), "http", "redirects are not followed")
      assert.equal(302, err.code)
    end)

    it("never brings a secret into an error", function()
      local err = fails(response(400, '{"reason":"bad amqp://u:sesame@h and hunter22 again"}'), "http", "bad amqp",
        { password = "hunter22" })
      assert.not_matches("sesame", err.message)
      assert.not_matches("hunter22", err.message)
      for _, opts in ipairs { { token = "hunter22" }, { password = function() return "hunter22" end } } do
        err = fails(response(400, '{"reason":"who is hunter22?"}'), "http", "who is %*%*%*", opts)
        assert.not_matches("hunter22", err.message)
      end
    end)

    it("that is nonsense is an error of kind protocol", function()
      for _, bytes in ipairs {
        "AMQP\0\0\9\1", "HTTP/1.1 two hundred\r\n\r\n", response(200, "<html>"), response(200, '"text"'),
        response(200, '{"not":"a list"}'), response(200, '["not objects"]'), response(200, ""),
        "HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "HTTP/1.1 200 OK\r\nfold: x\r\n y\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        response(200, ("["):rep(5000)),
      } do
        fails(bytes, "protocol", "answer is ")
      end
    end)

    it("that ends too early is an error of kind closed", function()
      fails("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n[]", "closed", "before it had answered")
      fails("HTTP/1.1 200 OK\r\nhalf", "closed", "before it had answered")
    end)

    it("is bounded in size, lines too", function()
      fails(response(200, (" "):rep(2000000)), "overflow", "max_body", { max_body = 100000 })
      fails("HTTP/1.1 200 OK\r\nx: " .. ("y"):rep(200000) .. "\r\n\r\n", "protocol", "line without an end")
    end)

    it("that does not come is a timeout, also when it dribbles", function()
      fails(function() end, "timeout", "0.05 s", { timeout = 0.05 })
      fails(function(_, peer)
        native.spawn(function()
          peer:write "HTTP/1.1 200 OK\r\n"
          for i = 1, 1000 do
            if not peer:write(("x-%d: y\r\n"):format(i)) then break end
            native.sleep(0.005)
          end
        end)
      end, "timeout", "0.1 s", { timeout = 0.1 })
    end)

    it("of nobody is refused", function()
      local _, err = management.new("http://127.0.0.1:1"):nodes()
      assert.equal("refused", err.kind)
      assert.is_true(err.temporary)
    end)

    it("of a queue tells its leader, whatever its kind, and survives lies", function()
      local function leader(body)
        local api = client(response(200, body))
        local found = assert(api:leader("/", "q"))
        server.stop()
        return found
      end
      assert.same({ type = "classic", leader = "b", members = { "a", "b" }, in_sync = { "b" }, state = "running" },
        leader '{"type":"classic","node":"b","slave_nodes":["a"],"synchronised_slave_nodes":[],"state":"running"}')
      assert.same({ type = "quorum", leader = "a", members = { "a", "b", "c" }, in_sync = { "a", "c" } },
        leader '{"type":"quorum","leader":"a","node":"b","members":["c","b","a"],"online":["a","c"]}')
      assert.same({ type = "classic", members = {}, in_sync = {} }, leader '{"type":7,"node":{},"slave_nodes":"no"}')
      assert.same({ type = "quorum", members = {}, in_sync = {} }, leader '{"type":"quorum","members":[1,null]}')
    end)
  end)

  describe("definitions", function()
    local function sample()
      return {
        rabbit_version = "3.10.8",
        global_parameters = { { name = "internal_cluster_id", value = "x" }, { name = "mqtt", value = 1 } },
        users = { { name = "guest", password_hash = "secret hash", tags = { "administrator" } } },
        queues = { { name = "q", vhost = "/", durable = true, arguments = { ["x-queue-type"] = "quorum" } } },
        bindings = { { source = "e", vhost = "/", destination = "q", destination_type = "queue", routing_key = "k",
          arguments = { a = 1, b = 2 } } },
      }
    end

    it("that are the same have no differences, whatever their cluster and order", function()
      local other = sample()
      other.rabbit_version = "3.12.0"
      other.global_parameters = { other.global_parameters[2], { name = "internal_cluster_id", value = "y" } }
      assert.same({}, management.compare(sample(), other))
    end)

    it("that differ say in what, without values", function()
      local other = sample()
      other.users[1].password_hash = "another hash"
      other.queues[1].arguments = { ["x-queue-type"] = "classic" }
      other.queues[2] = { name = "more", vhost = "/" }
      other.bindings = {}
      assert.same({
        { section = "users", name = "guest", status = "different", fields = { "password_hash" } },
        { section = "queues", vhost = "/", name = "more", status = "extra" },
        { section = "queues", vhost = "/", name = "q", status = "different", fields = { "arguments" } },
        { section = "bindings", vhost = "/", name = "e -> queue q (k)", status = "missing" },
      }, management.compare(sample(), other))
    end)

    it("that lie are compared all the same", function()
      assert.same({}, management.compare({ queues = "none", users = { 7, "x" } }, { bindings = false }))
    end)

    it("that are no JSON are not sent", function()
      local api = client(response(204, ""))
      local _, err = api:import_definitions "{ half"
      assert.equal("protocol", err.kind)
      assert.equal(0, #server.requests)
    end)
  end)

  it("is part of moonrabbit", function() assert.equal(management, moonrabbit.management) end)
end)
