-- The examples for nginx that are small, and what docs/openresty.md begins with, against a real broker. The others have
-- specs of their own: gateway, events and upstream.
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local cjson = require "cjson.safe"
local examples = require "support.nginx_examples"
local nginx = require "support.nginx"
local ok = broker.ok

local it = examples.it(it, pending)

describe("examples for nginx #resty", function()
  local at = {}

  before_each(function()
    examples.open(at)
    if at.channel then at.channel:queue_delete "access-log" end
  end)
  after_each(function()
    if at.server then at.server:stop() end
    if at.channel then
      at.channel:queue_delete "access-log"
      at.channel:exchange_delete "access"
    end
    at.server = nil
    examples.close(at)
  end)

  it("access-log: a message for each request, and none is waited for", function()
    examples.start(at, "access-log", { workers = 1 })
    for i = 1, 5 do
      assert.equal("hello\n", (at.server:request("/page" .. i, { headers = { ["User-Agent"] = "spec" } })))
    end
    local function shipped(n)
      broker.eventually(function() return cjson.decode((at.server:request "/stats")).confirmed == n end)
    end
    shipped(5)
    local uris = {}
    for _ = 1, 5 do
      local message = examples.next_message(at, "access-log")
      assert.equal("application/json", message.properties.content_type)
      local entry = assert(cjson.decode(message.body))
      uris[#uris + 1] = entry.uri
      assert.equal(200, entry.status)
      assert.equal("127.0.0.1", entry.client)
      assert.equal("GET", entry.method)
      assert.equal("spec", entry.agent)
      assert.matches("^%x+$", entry.id)
      for _, name in ipairs { "time", "bytes", "seconds" } do assert.equal("number", type(entry[name]), name) end
    end
    table.sort(uris)
    assert.same({ "/page1", "/page2", "/page3", "/page4", "/page5" }, uris)
    at.line.silent = true
    for i = 1, 5 do assert.equal("hello\n", (at.server:request("/silent" .. i))) end
    at.line:cut()
    at.line.silent = false
    shipped(10)
    for i = 1, 5 do assert.equal("/silent" .. i, cjson.decode(examples.next_message(at, "access-log").body).uri) end
    ok(at.channel:queue_declare("access-log", { durable = true })) -- refused if it were another kind
  end)

  it("access-log: counts what it drops while the broker is away for too long", function()
    local edit = { "entries = 50000", "entries = 3" }
    examples.start(at, "access-log", { workers = 1, edits = { ["access_log.lua"] = { edit } } })
    local function stats() return cjson.decode((at.server:request "/stats")) end
    broker.eventually(function() return at.server:request "/first" and stats().confirmed > 0 end)
    at.line.silent = true
    local before = stats()
    for i = 1, 8 do assert.equal("hello\n", (at.server:request("/more" .. i))) end
    local dropped = stats().dropped - before.dropped
    assert.truthy(dropped >= 5 and dropped <= 8, cjson.encode(stats()))
    at.line:cut()
    at.line.silent = false
    broker.eventually(function() return stats().confirmed >= before.confirmed + 8 - dropped end, 10, "the rest arrives")
  end)

  describe("webhook", function()
    local body = '{"event":1}'
    local signature

    before_each(function()
      if broker.not_ours() then return end
      at.channel:queue_delete "webhooks"
      -- printf '{"event":1}' | openssl dgst -sha1 -hmac spec
      signature = nginx.shell("printf '%s' '" .. body .. "' | openssl dgst -sha1 -hmac spec"):match "(%x+)$"
    end)

    after_each(function() if at.channel then at.channel:queue_delete "webhooks" end end)

    local function start(what)
      what = what or {}
      what.env = { WEBHOOK_SECRET = "spec" }
      examples.start(at, "webhook", what)
    end

    local function send(id, what)
      what = what or {}
      local text, status, headers = at.server:request("/hook", { body = what.body or body, headers = {
        ["X-Delivery-Id"] = id, ["X-Signature"] = what.signature or signature,
        ["Content-Type"] = "application/json" } })
      return status, headers, text
    end

    -- The ids of the next n messages.
    local function taken(n)
      local ids = {}
      for _ = 1, n do
        local message = examples.next_message(at, "webhooks")
        assert.equal(body, message.body)
        assert.equal("application/json", message.properties.content_type)
        ids[#ids + 1] = message.properties.message_id
      end
      table.sort(ids)
      assert.equal(0, ok(at.channel:queue_declare("webhooks", { durable = true })).message_count)
      return ids
    end

    it("webhook: taken once, however often it is sent", function()
      start()
      assert.equal(202, (send "one"), at.server:log())
      assert.equal(200, (send "one"))
      assert.equal(401, (send("two", { signature = ("0"):rep(40) })))
      assert.equal(401, (send("two", { body = "other" })))
      assert.equal(400, (select(2, at.server:request("/hook", { body = body }))))
      at.line.silent = true
      moonrabbit.run(function()
        local answers, headers = {}, {}
        for _ = 1, 2 do
          moonrabbit.spawn(function()
            local status, head = send "three"
            answers[#answers + 1], headers[#headers + 1] = status, head
          end)
        end
        broker.eventually(function() return answers[1] end, 10, "one of two at once is refused")
        assert.equal(409, answers[1])
        assert.equal("1", headers[1]["retry-after"])
        at.line.silent = false
        at.line:cut() -- it is sent again
        broker.eventually(function() return answers[2] end)
        assert.equal(202, answers[2])
      end)
      assert.equal(200, (send "three"))
      at.server:reload()
      assert.equal(200, (send "one"))
      assert.same({ "one", "three" }, taken(2))
    end)

    it("webhook: one that could not be published is asked for again", function()
      start()
      assert.equal(202, (send "one"))
      assert.same({ "one" }, taken(1))
      ok(at.channel:queue_delete "webhooks")
      local status, headers = send "two"
      assert.equal(503, status)
      assert.equal("1", headers["retry-after"])
      ok(at.channel:queue_declare("webhooks", { durable = true }))
      assert.equal(202, (send "two"))
      assert.same({ "two" }, taken(1))
    end)

    it("webhook: what it cannot remember it does not take", function()
      start { edits = { ["nginx.conf"] = { { "webhooks 10m", "webhooks 12k" } } } }
      local took, refused = {}, false
      for i = 1, 300 do
        local id = ("%03d"):format(i) .. ("x"):rep(190)
        local status = send(id)
        if status == 202 then took[#took + 1] = id else refused = status break end
      end
      assert.equal(503, refused, at.server:log())
      assert.same(took, taken(#took))
    end)

    it("webhook: does not start without a secret", function()
      assert.matches("WEBHOOK_SECRET is not set", (examples.refused(at, "webhook", { env = { WEBHOOK_SECRET = "" } })))
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
    ok(at.channel:queue_declare(queue))
    at.server = nginx.start({ text = text }):ready "/ping"
    assert.equal("the broker has it\n", (at.server:request("/hello/" .. queue)), at.server:log())
    assert.equal("hello", examples.next_message(at, queue).body)
    assert.matches("^no queue takes the message", (at.server:request("/hello/" .. queue .. "-that-is-not-there")))
    local body, status = at.server:request("/publish/" .. queue, { body = "what came" })
    assert.equal("the broker has it\n", body, at.server:log())
    assert.equal(202, status)
    assert.equal("what came", examples.next_message(at, queue).body)
    body, status = at.server:request("/publish/" .. queue, { body = ("x"):rep(2000000) })
    assert.matches("buffered the request body to disk", body)
    assert.equal(503, status)
    at.channel:queue_delete(queue)
  end)
end)
