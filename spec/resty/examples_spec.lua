-- The examples for nginx: each with its own nginx.conf, against a real broker.
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local cjson = require "cjson.safe"
local http_server = require "support.http_server"
local nginx = require "support.nginx"
local proxy = require "support.proxy"
local ok = broker.ok

local it = broker.it_unless(it, pending, broker.not_ours() or nginx.missing())

describe("examples for nginx #resty", function()
  local conn, channel, server, line

  -- On the broker, through a line that can be cut.
  local function start(name, what)
    what = what or {}
    local to = broker.parsed()
    line = proxy.start(to.host, to.port)
    what.example = "examples/openresty/" .. name
    what.env = what.env or {}
    what.env.AMQP_URL = broker.uri { host = "127.0.0.1", port = line.port }
    what.http = [[
      client_body_temp_path $prefix/tmp/body;
      proxy_temp_path $prefix/tmp/proxy;
      fastcgi_temp_path $prefix/tmp/fastcgi;
      uwsgi_temp_path $prefix/tmp/uwsgi;
      scgi_temp_path $prefix/tmp/scgi;
    ]] .. (what.http or "")
    what.server = (what.server or "") .. "\n location = /ping { log_by_lua_block { return } return 200; }"
    server = nginx.start(what):ready "/ping"
  end

  before_each(function()
    if broker.not_ours() then return end
    conn = broker.connect()
    channel = ok(conn:channel { confirm = true })
  end)

  after_each(function()
    if server then server:stop() end
    if line then line:stop() end
    server, line = nil, nil
    broker.close_all()
  end)

  local function next_message(queue)
    return broker.eventually(function() return channel:get(queue, { no_ack = true }) end, 10, "a message in " .. queue)
  end

  describe("gateway", function()
    local queue = "gateway-orders"

    before_each(function()
      if broker.not_ours() then return end
      ok(channel:queue_declare(queue, { durable = true }))
      ok(channel:queue_purge(queue))
      ok(channel:queue_bind(queue, "amq.topic", "order.#"))
    end)

    after_each(function() if conn then channel:queue_delete(queue) end end)

    it("gateway: 202 after the confirm, and headers become properties", function()
      start "gateway"
      broker.eventually(function() return select(2, server:request "/healthz") == 200 end)
      local body, status, headers = server:request("/publish/amq.topic/order.created", { body = '{"id":1}', headers = {
        ["Content-Type"] = "application/json", ["X-Amqp-Tenant"] = "blue", ["X-Correlation-Id"] = "c1",
        ["X-Expiration"] = "60000",
      } })
      assert.equal(202, status, body or server:log())
      local message = next_message(queue)
      assert.equal('{"id":1}', message.body)
      assert.equal("order.created", message.routing_key)
      assert.same({ tenant = "blue" }, message.headers)
      local properties = message.properties
      assert.equal("application/json", properties.content_type)
      assert.equal("c1", properties.correlation_id)
      assert.equal("60000", properties.expiration)
      assert.equal(headers["x-message-id"], properties.message_id)
      assert.matches("^%x+$", properties.message_id)
    end)

    it("gateway: the request's faults have their statuses", function()
      start "gateway"
      local function status(path, opts) return (select(2, server:request(path, opts))) end
      assert.equal(404, status("/publish//no-such-queue", { body = "x" }))
      assert.equal(404, status("/publish/no-such-exchange/k", { body = "x" }))
      assert.equal(405, status "/publish/amq.topic/order.created")
      assert.equal(413, status("/publish/amq.topic/order.created", { body = ("x"):rep(1100000) }))
      assert.equal(202, status("/publish/amq.topic/order.created", { body = ("x"):rep(1000000) }))
      assert.equal(400, status("/publish/amq.topic/order.x", { body = "x", headers = { ["X-Expiration"] = "soon" } }))
      assert.equal(400, status("/publish/amq.topic/order." .. ("x"):rep(260), { body = "x" }))
    end)

    it("gateway: 503 with Retry-After while the broker is away or the queue is full", function()
      start("gateway", { workers = 1 })
      assert.equal(202, (select(2, server:request("/publish/amq.topic/order.a", { body = "x" }))))
      line:stop()
      broker.eventually(function() return select(2, server:request "/healthz") == 503 end)
      local _, status, headers = server:request("/publish/amq.topic/order.a", { body = "x" })
      assert.equal(503, status)
      assert.equal("1", headers["retry-after"])
      assert.equal(200, (select(2, server:request "/ping")))
      local to = broker.parsed()
      line = proxy.start(to.host, to.port, line.port)
      broker.eventually(function()
        return select(2, server:request("/publish/amq.topic/order.a", { body = "x" })) == 202
      end)
    end)

    it("gateway: a call gets its reply", function()
      start "gateway"
      ok(channel:queue_declare("gateway-double", { auto_delete = true }))
      ok(conn:consume("gateway-double", function(message)
        message:reply(tostring(tonumber(message.body) * 2), { content_type = "text/plain" })
        message:ack()
      end))
      moonrabbit.run(function()
        local answer, status, headers
        moonrabbit.spawn(function()
          answer, status, headers = server:request("/call/gateway-double", { body = "21" })
        end)
        broker.eventually(function() return status end)
        assert.equal(200, status, answer)
        assert.equal("42", answer)
        assert.equal("text/plain", headers["content-type"])
      end)
      assert.equal(404, (select(2, server:request("/call/no-such-queue", { body = "x" }))))
      ok(channel:queue_declare("gateway-silent", { exclusive = true }))
      assert.equal(504, (select(2, server:request("/call/gateway-silent", { body = "x" }))))
    end)
  end)

  it("access-log: a message for each request, and none is waited for", function()
    channel:queue_delete "access-log"
    start("access-log", { workers = 1 })
    for i = 1, 5 do assert.equal("hello\n", (server:request("/page" .. i))) end
    local function shipped(n)
      broker.eventually(function() return cjson.decode((server:request "/stats")).confirmed == n end)
    end
    shipped(5)
    local uris = {}
    for _ = 1, 5 do
      local message = next_message "access-log"
      local entry = assert(cjson.decode(message.body))
      uris[#uris + 1] = entry.uri
      assert.equal(200, entry.status)
      assert.equal("127.0.0.1", entry.client)
    end
    table.sort(uris)
    assert.same({ "/page1", "/page2", "/page3", "/page4", "/page5" }, uris)
    line.silent = true
    for i = 1, 5 do assert.equal("hello\n", (server:request("/silent" .. i))) end
    line:cut()
    line.silent = false
    shipped(10)
    for i = 1, 5 do assert.equal("/silent" .. i, cjson.decode(next_message("access-log").body).uri) end
    channel:queue_delete "access-log"
    channel:exchange_delete "access"
  end)

  it("webhook: taken once, however often it is sent", function()
    channel:queue_delete "webhooks"
    start("webhook", { env = { WEBHOOK_SECRET = "spec" } })
    -- printf '{"event":1}' | openssl dgst -sha1 -hmac spec
    local body = '{"event":1}'
    local signature = nginx.shell("printf '%s' '" .. body .. "' | openssl dgst -sha1 -hmac spec"):match "(%x+)$"
    local function send(id, what)
      what = what or {}
      local _, status, headers = server:request("/hook", { body = what.body or body, headers = {
        ["X-Delivery-Id"] = id, ["X-Signature"] = what.signature or signature } })
      return status, headers
    end
    assert.equal(202, (send "one"), server:log())
    assert.equal(200, (send "one"))
    assert.equal(401, (send("two", { signature = ("0"):rep(40) })))
    assert.equal(401, (send("two", { body = "other" })))
    assert.equal(400, (select(2, server:request("/hook", { body = body }))))
    line.silent = true
    moonrabbit.run(function()
      local first, second
      moonrabbit.spawn(function() first = send "three" end)
      moonrabbit.spawn(function()
        moonrabbit.sleep(0.2)
        second = send "three"
      end)
      broker.eventually(function() return second end)
      assert.equal(409, second)
      line.silent = false
      line:cut() -- it is sent again
      broker.eventually(function() return first end)
      assert.equal(202, first)
    end)
    assert.equal(200, (send "three"))
    server:reload()
    assert.equal(200, (send "one"))
    local ids = {}
    for _ = 1, 2 do
      local message = next_message "webhooks"
      assert.equal(body, message.body)
      ids[message.properties.message_id] = true
    end
    assert.same({ one = true, three = true }, ids)
    channel:queue_delete "webhooks"
  end)

  describe("upstream", function()
    local upstream
    local told = {} -- body -> what the upstream answers, in turn; the last one again and again

    before_each(function()
      if broker.not_ours() then return end
      upstream = http_server.start(function(request)
        local answers = told[request.body] or { "200" }
        local answer = #answers > 1 and table.remove(answers, 1) or answers[1]
        if answer == "hang up" then return "" end
        local status, retry_after = answer:match "^(%d+) ?(%d*)$"
        return http_server.response(tonumber(status), "it says " .. status,
          retry_after ~= "" and "retry-after: " .. retry_after .. "\r\n" or "")
      end)
    end)

    after_each(function()
      if upstream then upstream.stop() end
      upstream, told = nil, {}
      for _, queue in ipairs { "upstream.orders", "upstream.dead" } do channel:queue_delete(queue) end
    end)

    local function calls(body)
      local n = 0
      for _, request in ipairs(upstream.requests) do
        if request.body == body then n = n + 1 end
      end
      return n
    end

    it("upstream: calls, tries again what fails, and parks what cannot succeed", function()
      for _, queue in ipairs { "upstream.orders", "upstream.dead" } do channel:queue_delete(queue) end
      start("upstream", { env = { UPSTREAM_URL = upstream.uri:gsub("guest:guest@", "") .. "/orders" } })
      broker.eventually(function() return select(2, server:request "/readyz") == 200 end, 20, "both workers are ready")
      told.flaky, told.away, told.busy = { "500", "200" }, { "hang up", "200" }, { "429 1", "200" }
      told.wrong = { "422" }
      local expected = { flaky = 2, away = 2, busy = 2, wrong = 1 }
      for i = 1, 40 do
        expected["order" .. i] = 1
        if i % 4 == 0 then
          told["order" .. i], expected["order" .. i] = { "503", "200" }, 2
        end
      end
      for body in pairs(expected) do
        ok(channel:publish_async(body, { routing_key = "upstream.orders", message_id = "id-" .. body,
          content_type = "text/plain" }))
      end
      ok(channel:wait_for_confirms(10))
      -- A reload in the middle of it: nothing is lost.
      broker.eventually(function() return #upstream.requests > 10 end)
      server:reload()
      for body, n in pairs(expected) do
        broker.eventually(function() return calls(body) >= n end, 20, body .. " is called")
        assert.equal(n, calls(body), body .. "\n" .. server:log())
      end
      local request = upstream.requests[1]
      assert.equal("POST", request.method)
      assert.equal("/orders", request.target)
      assert.equal("text/plain", request.headers["content-type"])
      assert.equal("id-" .. request.body, request.headers["idempotency-key"])
      local dead = next_message "upstream.dead"
      assert.equal("wrong", dead.body)
      assert.matches("the upstream answered 422: it says 422", dead.headers["moonrabbit-error"])
      broker.eventually(function()
        return ok(channel:queue_declare("upstream.orders", { passive = true })).message_count == 0
      end)
      assert.matches("moonrabbit_messages_settled_total{queue=\"upstream.orders\",outcome=\"dead_letter\"} 1\n",
        (server:request "/metrics"))
    end)
  end)

  it("docs/openresty.md: from nothing to a confirmed publish, in ten lines", function()
    local file = assert(io.open "docs/openresty.md")
    local text, location = file:read("*a"):match "\n```nginx\n(.-\n)```.-\n```nginx\n(.-\n)```"
    file:close()
    assert.equal(10, select(2, text:gsub("\n", "")))
    -- What Debian's package has in files of its own, and this checkout in place of /usr/local.
    local changes = {
      { "include /etc/nginx/modules-enabled/*.conf;", [[load_module $modules/ndk_http_module.so;
        load_module $modules/ngx_http_lua_module.so;]] },
      { "events { }", [[user $owner;
        pid $prefix/nginx.pid;
        error_log $prefix/logs/error.log info;
        events { }]] },
      { "http {", [[http {
        access_log off;
        client_body_temp_path $prefix/tmp/body;
        proxy_temp_path $prefix/tmp/proxy;
        fastcgi_temp_path $prefix/tmp/fastcgi;
        uwsgi_temp_path $prefix/tmp/uwsgi;
        scgi_temp_path $prefix/tmp/scgi;
        lua_package_cpath '$build/5.1/?.so;;';
        lua_package_path '$here/lua/?.lua;$here/lua/?/init.lua;;';]] },
      { "amqp://guest:guest@127.0.0.1/", broker.uri {} },
      { "listen 8080;", "listen 127.0.0.1:$port; client_max_body_size 4m; location = /ping { return 200; }\n"
        .. location },
    }
    for _, change in ipairs(changes) do
      local from, to = text:find(change[1], 1, true)
      assert.truthy(from, "docs/openresty.md lacks " .. change[1])
      text = text:sub(1, from - 1) .. change[2] .. text:sub(to + 1)
    end
    local queue = broker.unique "docs"
    ok(channel:queue_declare(queue))
    server = nginx.start({ text = text }):ready "/ping"
    assert.equal("the broker has it\n", (server:request("/hello/" .. queue)), server:log())
    assert.equal("hello", next_message(queue).body)
    local body, status = server:request("/publish/" .. queue, { body = "what came" })
    assert.equal("the broker has it\n", body, server:log())
    assert.equal(202, status)
    assert.equal("what came", next_message(queue).body)
    body, status = server:request("/publish/" .. queue, { body = ("x"):rep(2000000) })
    assert.matches("buffered the request body to disk", body)
    assert.equal(503, status)
    channel:queue_delete(queue)
  end)

  describe("events", function()
    local chromium = nginx.shell "command -v chromium || command -v chromium-browser || command -v google-chrome"

    -- A page of the spec's own frames the example's, and reports what appears in its list.
    local watcher = [[
      location = /watch {
        default_type text/html;
        return 200 '<!DOCTYPE html><iframe src="/"></iframe><script>
          const report = text => fetch("/report", { method: "POST", body: text });
          let last = "";
          setInterval(() => {
            const page = document.querySelector("iframe").contentDocument;
            const state = page.getElementById("state");
            if (!state) return;
            const items = Array.from(page.querySelectorAll("#list li")).map(item => item.textContent);
            const text = [state.textContent, ...items].join("|");
            if (text !== last) { last = text; report(text); }
          }, 50);
        </script>';
      }
      location = /report {
        content_by_lua_block {
          ngx.req.read_body()
          ngx.shared.report:set("text", ngx.req.get_body_data() or "")
        }
      }
      location = /reported { content_by_lua_block { ngx.print(ngx.shared.report:get "text" or "") } }
    ]]

    it("events: what is published appears in a real browser", function()
      if chromium == "" then return pending "chromium is not installed" end
      start("events", { http = "lua_shared_dict report 1m;", server = watcher })
      local profile = server.prefix .. "/browser"
      local browser = nginx.shell(("%s --headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        .. "--disable-background-networking --disable-component-update --disable-sync --user-data-dir='%s' "
        .. "--remote-debugging-port=0 http://127.0.0.1:%d/watch > '%s/browser.log' 2>&1 & echo $!"):format(chromium,
        profile, server.port, server.prefix))
      local function reported() return (server:request "/reported") or "" end
      local fine, problem = pcall(function()
        broker.eventually(function() return reported() == "open" end, 30, "the page is open")
        ok(channel:publish("hello <b>world</b>", { exchange = "events", routing_key = "news" }))
        broker.eventually(function() return reported() == "open|newshello <b>world</b>" end, 10, "the first event")
        ok(channel:publish("two\nlines", { exchange = "events", routing_key = "more" }))
        broker.eventually(function() return reported() == "open|moretwo\nlines|newshello <b>world</b>" end, 10,
          "the second")
        -- The worker that serves the page goes; the browser comes back by itself.
        server:reload()
        broker.eventually(function() return reported():find "^open" and channel:publish("again", { exchange = "events",
          routing_key = "news" }) and reported():find("newsagain", 1, true) end, 20, "events after a reload")
      end)
      os.execute("kill " .. browser)
      pcall(nginx.gone, { tonumber(browser) }, 5)
      assert(fine, tostring(problem) .. "\nreported: " .. reported() .. "\n" .. server:log())
    end)

    it("events: a browser that leaves is forgotten", function()
      start "events"
      for _ = 1, 3 do
        server:request("/events", { version = "1.1", on = function(transport)
          local head = ""
          repeat head = head .. ok(transport:read(100, 5)) until head:find ": hello"
          transport:close()
        end })
      end
      ok(channel:exchange_declare("events", { type = "topic", durable = true }))
      assert.equal(200, (select(2, server:request "/ping")))
      server:logged "connected to"
    end)
  end)
end)
