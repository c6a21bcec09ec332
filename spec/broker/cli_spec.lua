-- The command line as its users have it: processes, exit codes, what is on stdout and on stderr.
local cjson = require "cjson"
local broker = require "support.broker"
local process = require "support.process"

local it = broker.it_unless(it, pending, broker.none())
local url = broker.url or "amqp://guest:guest@none.invalid/" -- not used then
local host, port = url:match "@([^:/]+):?(%d*)"
port = tonumber(port) or 5672

-- Everything that was ever printed: no password may be in it.
local printed = {}
local SECRET = "hush-4711-S3cret"

local function run(words, options)
  local result = process.run(words, options)
  printed[#printed + 1] = result.out .. result.err
  return result
end

local function moonrabbit(...) return run { "bin/moonrabbit", ... } end

local function with(options, ...) return run({ "bin/moonrabbit", ... }, options) end

local function ok(result)
  assert.equal("", result.err)
  assert.equal(0, result.code)
  return result.out
end

local function one_line(code, what, result)
  assert.equal(code, result.code, result.err .. result.out)
  assert.truthy(result.err:find "^moonrabbit: [^\n]+\n$", result.err)
  assert.truthy(result.err:find(what, 1, true), result.err)
  assert.falsy(result.err:find("traceback", 1, true), result.err)
end

local function lines(text)
  local list = {}
  for line in text:gmatch "[^\n]*\n" do list[#list + 1] = line:sub(1, -2) end
  return list
end

local function management(method, path, body)
  local address = os.getenv "AMQP_MANAGEMENT_URL"
  if not address then return false end
  -- curl hangs under a sanitizer that is meant for us.
  local command = ("env -u LD_PRELOAD curl -sf --max-time 20 -X %s -H content-type:application/json %s %s%s "
    .. "> /dev/null 2>&1"):format(method, body and "-d " .. process.quote(body) or "", address, path)
  local status = os.execute(command)
  return status == true or status == 0
end

describe("moonrabbit #smoke", function()
  local queue = ("cli-spec-%d-%s"):format(os.time(), process.lua)

  before_each(function() if broker.url then ok(moonrabbit("declare", "queue", queue)) end end)
  after_each(function() if broker.url then ok(moonrabbit("delete", "queue", queue, "--quiet")) end end)

  it("publishes and consumes", function()
    assert.equal("1 published, 1 confirmed\n", ok(moonrabbit("publish", "-k", queue, "hello")))
    assert.equal("hello\n", ok(moonrabbit("consume", queue, "--count", "1")))
    assert.equal("", ok(moonrabbit("consume", queue, "--timeout", "0.2")))
  end)

  it("publishes a line of stdin each", function()
    local out = ok(with({ stdin = "one\ntwo\n\nlast without an end" }, "publish", "-k", queue, "--json"))
    local summary = cjson.decode(out)
    assert.equal(4, summary.published)
    assert.equal(4, summary.confirmed)
    assert.equal(0, summary.failed)
    assert.equal("one\ntwo\n\nlast without an end\n", ok(moonrabbit("consume", queue, "-n", "4")))
  end)

  it("publishes nothing from an empty stdin", function()
    assert.equal("0 published, 0 confirmed\n", ok(with({ stdin = "" }, "publish", "-k", queue)))
  end)

  it("carries any bytes by --file and --raw", function()
    local all = {}
    for i = 0, 255 do all[#all + 1] = string.char(i) end
    local bytes = table.concat(all):rep(1000) .. "\n"
    local path = process.file(bytes)
    ok(moonrabbit("publish", "-k", queue, "--file", path))
    os.remove(path)
    assert.truthy(ok(moonrabbit("get", queue, "--raw")) == bytes)
    local message = cjson.decode(ok(moonrabbit("consume", queue, "-n", "1", "--json")))
    assert.equal("base64", message.body_encoding)
    assert.equal(math.ceil(#bytes / 3) * 4, #message.body)
    assert.equal("AAECAwQFBgcI", message.body:sub(1, 12))
    ok(with({ stdin = bytes }, "publish", "-k", queue, "--file", "-"))
    assert.truthy(ok(moonrabbit("consume", queue, "--raw", "-n", "1")) == bytes)
  end)

  it("carries headers and properties, typed", function()
    ok(moonrabbit("publish", "-k", queue, "-H", "plain=5", "-H", "number:=5", "-H", 'deep:={"a":[1,2.5,null,true]}',
      "-H", "empty=", "--content-type", "text/plain", "--priority", "3", "--correlation-id", "c1", "--message-id", "m1",
      "--timestamp", "1700000000", "--type", "t", "--app-id", "a", "--expiration", "60000", "--reply-to", "r",
      "grüße \"\\\t"))
    local message = cjson.decode(ok(moonrabbit("get", queue, "--json", "--ack-mode", "ack")))
    assert.equal("grüße \"\\\t", message.body)
    assert.equal("utf-8", message.body_encoding)
    assert.same({ plain = "5", number = 5, deep = { a = { 1, 2.5, cjson.null, true } }, empty = "" }, message.headers)
    assert.same({
      content_type = "text/plain", delivery_mode = 2, priority = 3, correlation_id = "c1", message_id = "m1",
      timestamp = 1700000000, type = "t", app_id = "a", expiration = "60000", reply_to = "r",
    }, message.properties)
    assert.equal(queue, message.routing_key)
    assert.equal("", message.exchange)
    assert.is_false(message.redelivered)
    assert.equal(0, message.message_count)
  end)

  it("shows typed values of headers exactly", function()
    local moonrabbit_lua = process.file(([[
      local moonrabbit = require "moonrabbit"
      local types = moonrabbit.types
      local ch = assert(moonrabbit.connect(%q)):channel { confirm = true }
      assert(ch:publish("\255", { routing_key = %q, headers = {
        time = types.timestamp(1700000000), price = types.decimal(314, 2), big = types.int64 "9007199254740993",
        nothing = moonrabbit.null, float = 1.5, bytes = "\254",
      } }))
    ]]):format(url, queue))
    ok(run { moonrabbit_lua })
    os.remove(moonrabbit_lua)
    local text = ok(moonrabbit("get", queue, "--json"))
    assert.truthy(text:find('"headers":{"big":9007199254740993,"bytes":{"base64":"/g=="},"float":1.5,"nothing":null,'
      .. '"price":3.14,"time":1700000000}', 1, true), text)
    assert.truthy(text:find('"body":"/w==","body_encoding":"base64"', 1, true), text)
  end)

  it("repeats", function()
    assert.equal("2500 published, 2500 confirmed\n", ok(moonrabbit("publish", "-k", queue, "-n", "2500", "x")))
    assert.equal(("x\n"):rep(2500), ok(moonrabbit("consume", queue, "-n", "2500", "--prefetch", "50")))
    assert.equal("0 messages purged from " .. queue .. "\n", ok(moonrabbit("purge", queue)))
  end)

  it("exits with 1 when a message cannot be routed", function()
    local result = moonrabbit("publish", "-k", queue .. "-nowhere", "-n", "3", "x")
    assert.equal("3 published, 0 confirmed, 3 failed\n", result.out)
    one_line(1, "3 messages: no queue takes the message", result)
    assert.equal("1 published, 1 confirmed\n",
      ok(moonrabbit("publish", "-k", queue .. "-nowhere", "--no-mandatory", "x")))
    one_line(1, "404", moonrabbit("publish", "-e", queue .. "-no-exchange", "x"))
  end)

  it("gets without taking, unless told to", function()
    local result = moonrabbit("get", queue)
    one_line(1, "is empty", result)
    assert.equal("", result.out)
    ok(with({ stdin = "a\nb\nc\n" }, "publish", "-k", queue))
    assert.equal("a\nb\n", ok(moonrabbit("get", queue, "-n", "2")))
    assert.equal("a\nb\nc\n", ok(moonrabbit("get", queue, "-n", "9")))
    assert.equal("a\n", ok(moonrabbit("get", queue, "--ack-mode", "ack")))
    assert.equal("b\n", ok(moonrabbit("get", queue, "--ack-mode", "reject")))
    assert.equal("c\n", ok(moonrabbit("get", queue, "--ack-mode", "none")))
    assert.equal(1, moonrabbit("get", queue, "--quiet").code)
  end)

  it("consumes in each ack mode", function()
    ok(with({ stdin = "a\nb\nc\n" }, "publish", "-k", queue))
    assert.equal("a\nb\n", ok(moonrabbit("consume", queue, "--ack-mode", "requeue", "-n", "2")))
    assert.equal("a\nb\nc\n", ok(moonrabbit("consume", queue, "--ack-mode", "requeue", "--timeout", "2")))
    assert.equal("a\n", ok(moonrabbit("consume", queue, "-n", "1")))
    assert.equal("b\n", ok(moonrabbit("consume", queue, "--ack-mode", "reject", "-n", "1")))
    assert.equal("c\n", ok(moonrabbit("consume", queue, "--ack-mode", "none", "-n", "1")))
    one_line(1, "0 of 1 messages", moonrabbit("consume", queue, "-n", "1", "--timeout", "0.2"))
  end)

  it("declares, binds and deletes", function()
    local exchange = queue .. "-x"
    assert.equal("exchange " .. exchange .. "\n", ok(moonrabbit("declare", "exchange", exchange, "--type", "topic")))
    ok(moonrabbit("declare", "exchange", exchange .. "2", "--type", "fanout", "--alternate", "amq.fanout"))
    assert.equal(("queue %s bound to %s with 'a.*'\n"):format(queue, exchange),
      ok(moonrabbit("bind", "queue", queue, exchange, "-k", "a.*")))
    ok(moonrabbit("bind", "exchange", exchange, exchange .. "2"))
    ok(moonrabbit("publish", "-e", exchange, "-k", "a.b", "one"))
    ok(moonrabbit("publish", "-e", exchange .. "2", "-k", "a.c", "two"))
    one_line(1, "no queue takes", moonrabbit("publish", "-e", exchange, "-k", "b.b", "x"))
    assert.equal("one\ntwo\n", ok(moonrabbit("consume", queue, "-n", "2")))
    ok(moonrabbit("bind", "queue", queue, exchange, "-k", "a.*", "--remove"))
    one_line(1, "no queue takes", moonrabbit("publish", "-e", exchange, "-k", "a.b", "x"))
    assert.equal("exchange " .. exchange .. " deleted\n", ok(moonrabbit("delete", "exchange", exchange)))
    ok(moonrabbit("delete", "exchange", exchange .. "2"))
    one_line(1, "404", moonrabbit("declare", "exchange", exchange, "--passive"))
    one_line(1, "406", moonrabbit("declare", "queue", queue, "--transient"))
    one_line(1, "404", moonrabbit("purge", queue .. "-none"))
    one_line(1, "404", moonrabbit("consume", queue .. "-none"))
  end)

  it("declares queues with arguments", function()
    local name = queue .. "-args"
    local declared = cjson.decode(ok(moonrabbit("declare", "queue", name, "--argument", "x-message-ttl=60000",
      "--argument", "x-dead-letter-exchange=amq.topic", "--argument", "x-max-length:=10", "--json")))
    assert.same({ queue = name, messages = 0, consumers = 0 }, declared)
    ok(moonrabbit("publish", "-k", name, "x"))
    assert.equal(("queue %s: 1 messages, 0 consumers\n"):format(name),
      ok(moonrabbit("declare", "queue", name, "--passive")))
    one_line(1, "406", moonrabbit("delete", "queue", name, "--if-empty"))
    assert.equal(("queue %s deleted, 1 messages with it\n"):format(name), ok(moonrabbit("delete", "queue", name)))
    ok(moonrabbit("declare", "queue", name, "--type", "quorum"))
    ok(moonrabbit("delete", "queue", name))
    assert.truthy(ok(moonrabbit("declare", "queue", "--auto-delete", "--transient")):find "^queue amq%.gen")
  end)

  it("stops consuming on a signal, with its acks sent", function()
    ok(with({ stdin = "a\nb\n" }, "publish", "-k", queue))
    for name, code in pairs { INT = 130, TERM = 143 } do
      ok(with({ stdin = "c\n" }, "publish", "-k", queue))
      local consumer = process.start { "bin/moonrabbit", "consume", queue }
      assert.truthy(consumer:await "c\n", consumer:err())
      consumer:signal(name)
      assert.equal(code, consumer:wait(), consumer:err())
      assert.equal("", consumer:err())
      consumer:stop()
      assert.equal(("queue %s: 0 messages, 0 consumers\n"):format(queue), ok(moonrabbit("declare", "queue", queue)))
    end
  end)

  it("loses nothing when the reader of its output is gone", function()
    ok(moonrabbit("publish", "-k", queue, "-n", "1000", ("x"):rep(1000)))
    local script = process.command { "bin/moonrabbit", "consume", queue } .. " | head -n 1"
    run({ "sh", "-c", script }, { raw = true })
    local left = cjson.decode(ok(moonrabbit("declare", "queue", queue, "--json"))).messages
    assert.truthy(left >= 800, left)
  end)

  it("publishes a line when it comes, not when the next one does", function()
    local go_on = os.tmpname()
    os.remove(go_on)
    local script = ("(echo first; until [ -e %s ]; do sleep 0.05; done; echo second) | "):format(go_on)
      .. process.command { "bin/moonrabbit", "publish", "-k", queue }
    local publisher = process.start({ "sh", "-c", script }, { raw = true })
    finally(function()
      io.open(go_on, "w"):close()
      publisher:wait()
      publisher:stop()
      os.remove(go_on)
    end)
    assert.equal("first\n", ok(moonrabbit("consume", queue, "-n", "1", "--timeout", "20")))
    assert.equal("", publisher:out())
    io.open(go_on, "w"):close()
    assert.equal(0, publisher:wait(), publisher:err())
    assert.equal("2 published, 2 confirmed\n", publisher:out())
  end)

  it("says so when the broker goes away", function()
    if not broker.name then pending "needs a private broker" return end
    local consumer = process.start { "bin/moonrabbit", "consume", queue }
    ok(moonrabbit("publish", "-k", queue, "up"))
    assert.truthy(consumer:await "up\n")
    run({ "sh", "-c", "scripts/broker ctl --name " .. broker.name .. " -q close_all_connections 'so that it is seen'" },
      { raw = true })
    assert.equal(1, consumer:wait(), consumer:err())
    assert.truthy(consumer:err():find "^moonrabbit: [^\n]*so that it is seen[^\n]*\n$", consumer:err())
    consumer:stop()
  end)

  it("puts back what a full disk did not take", function()
    if not io.open "/dev/full" then pending "there is no /dev/full" return end
    ok(moonrabbit("publish", "-k", queue, "precious"))
    local script = process.command { "bin/moonrabbit", "consume", queue, "-n", "1" } .. " > /dev/full"
    one_line(1, "stdout cannot be written", run({ "sh", "-c", script }, { raw = true }))
    assert.equal("precious\n", ok(moonrabbit("consume", queue, "-n", "1")))
  end)
end)

describe("moonrabbit's usage #smoke", function()
  it("is told by --help and --version", function()
    local out = ok(moonrabbit "--help")
    for _, command in ipairs { "publish", "consume", "get", "declare", "bind", "delete", "purge", "doctor" } do
      assert.truthy(out:find("\n   " .. command .. " ", 1, true), command)
      assert.truthy(ok(moonrabbit(command, "--help")):find("Usage: moonrabbit " .. command, 1, true))
    end
    assert.truthy(out:find("Exit codes", 1, true))
    assert.truthy(ok(moonrabbit "--version"):find "^moonrabbit .*rabbitmq%-c")
  end)

  it("exits with 2 and one line when it is wrong", function()
    one_line(2, "command", moonrabbit())
    one_line(2, "unknown command", moonrabbit "conusme")
    one_line(2, "unknown option", moonrabbit("consume", "q", "--nope"))
    one_line(2, "missing argument", moonrabbit "consume")
    one_line(2, "'x'", moonrabbit("consume", "q", "--count", "x"))
    one_line(2, "'0'", moonrabbit("consume", "q", "--count", "0"))
    one_line(2, "seconds", moonrabbit("consume", "q", "--timeout", "0"))
    one_line(2, "ack-mode", moonrabbit("consume", "q", "--ack-mode", "maybe"))
    one_line(2, "--raw and --json", moonrabbit("consume", "q", "--raw", "--json"))
    one_line(2, "--routing-key", moonrabbit("publish", "x"))
    one_line(2, "a body and --file", moonrabbit("publish", "x", "--file", "y"))
    one_line(2, "--count", moonrabbit("publish", "-k", "q", "--count", "3"))
    one_line(2, "name=value", moonrabbit("publish", "x", "-k", "q", "-H", "nonsense"))
    one_line(2, "no JSON", moonrabbit("publish", "x", "-k", "q", "-H", "a:={"))
    one_line(2, "255", moonrabbit("publish", "x", "-k", ("k"):rep(256)))
    one_line(2, "255", moonrabbit("publish", "x", "-k", "q", "--priority", "256"))
    one_line(2, "nothing-there", moonrabbit("publish", "-k", "q", "--file", "/nothing-there"))
    one_line(2, "amqps://", moonrabbit("purge", "q", "--url", "amqp://localhost/", "--ca", "x"))
    one_line(2, "amqp://", moonrabbit("purge", "q", "--url", "http://localhost/"))
    one_line(2, "empty", moonrabbit("purge", "q", "--url-file", "/dev/null"))
    one_line(2, "password file", moonrabbit("purge", "q", "--password-file", "/nothing-there"))
  end)

  it("refuses what does not fit a message before a byte is sent", function()
    one_line(1, "too large", moonrabbit("publish", "x", "-k", "q", "-H", "a=" .. ("x"):rep(60000), "-H",
      "b=" .. ("x"):rep(60000), "-H", "c=" .. ("x"):rep(60000)))
  end)

  it("takes the URL from a file or the environment, options before and after the command", function()
    local file = process.file(url .. "\r\nanother line\n")
    local nowhere = { AMQP_URL = "amqp://127.0.0.1:1/", MOONRABBIT_URL = "amqp://127.0.0.1:1/" }
    local words = { "declare", "exchange", "amq.direct", "--passive" }
    ok(with({ env = nowhere }, words[1], words[2], words[3], words[4], "--url-file", file))
    ok(with({ env = nowhere }, "--url-file", file, words[1], words[2], words[3], words[4]))
    local both = { AMQP_URL = "amqp://127.0.0.1:1/", MOONRABBIT_URL = url }
    ok(with({ env = both }, words[1], words[2], words[3], words[4]))
    ok(with({ env = nowhere }, "-u", url, words[1], words[2], words[3], words[4]))
    one_line(3, "127.0.0.1:1", with({ env = nowhere }, words[1], words[2], words[3], words[4]))
    os.remove(file)
  end)
end)

describe("moonrabbit without a connection #smoke", function()
  local function purge(given, ...) return moonrabbit("purge", "q", "--timeout", "3", "--url", given, ...) end
  local here = "@" .. host .. ":" .. port .. "/"

  it("tells refused, unknown names and silence apart: 3", function()
    one_line(3, "refused", purge "amqp://guest:guest@127.0.0.1:1/")
    one_line(3, "no-such-host.invalid", purge "amqp://guest:guest@no-such-host.invalid/")
    local server = require "moonrabbit.net".listen("127.0.0.1", 0)
    one_line(3, "within 3 s", purge("amqp://guest:guest@127.0.0.1:" .. server:port() .. "/"))
    server:close()
  end)

  it("tells a wrong password and an unknown vhost: 4", function()
    one_line(4, "", purge("amqp://guest:" .. SECRET .. here))
    one_line(4, "nowhere", purge("amqp://guest:guest" .. here .. "nowhere"))
    local file = process.file(SECRET .. "\n")
    one_line(4, "", purge("amqp://guest:guest" .. here, "--password-file", file))
    os.remove(file)
    local result = with({ env = { MOONRABBIT_PASSWORD = SECRET } }, "purge", "q")
    assert.equal(4, result.code)
  end)

  it("never repeats a password that was typed in a wrong place", function()
    local words = "amqp://me:" .. SECRET .. "@h/"
    for _, result in ipairs {
      moonrabbit("purge", words, "--nope"), moonrabbit(words), moonrabbit("consume", "q", "--count", words),
      moonrabbit("purge", "q", "--url", "amqp://me:" .. SECRET .. "@h:port/"),
    } do
      assert.equal(2, result.code)
      assert.falsy(result.err:find(SECRET, 1, true), result.err)
    end
  end)
end)

describe("moonrabbit doctor", function()
  local function doctor(...) return moonrabbit("doctor", "--timeout", "2", ...) end

  local function fails(code, step, what, advice, result)
    assert.equal(code, result.code, result.out)
    assert.equal("", result.err)
    local found = result.out:match("✗ " .. step .. " *([^\n]*)")
    assert.truthy(found, result.out)
    assert.truthy(found:lower():find(what:lower(), 1, true), found)
    assert.truthy(result.out:match "→ ([^\n]*)":find(advice, 1, true), result.out)
  end

  it("finds a healthy broker healthy #smoke", function()
    local out = ok(moonrabbit("doctor", "--rounds", "3"))
    for _, step in ipairs {
      "URL", "DNS", "TCP", "TLS", "protocol", "login", "vhost", "permissions", "versions", "tuned", "round trip",
    } do
      assert.truthy(out:find("✓ " .. step, 1, true), step)
    end
    assert.falsy(out:find("✗", 1, true))
    assert.truthy(out:find "RabbitMQ %d+%.%d+")
  end)

  it("says so in JSON", function()
    local out = ok(moonrabbit("doctor", "--json", "--rounds", "3"))
    assert.equal(1, #lines(out))
    local report = cjson.decode(out)
    assert.is_true(report.ok)
    local by_name = {}
    for _, step in ipairs(report.steps) do by_name[step.step] = step end
    assert.is_true(by_name.permissions.data.write)
    assert.equal(3, by_name["round trip"].data.rounds)
    assert.truthy(by_name.versions.data.broker:find "RabbitMQ")
    report = cjson.decode(doctor("--json", "--url", "amqp://127.0.0.1:1/").out)
    assert.is_false(report.ok)
    assert.equal(3, report.exit_code)
  end)

  it("finds each thing that is wrong", function()
    fails(2, "URL", "amqp", "percent", doctor("--url", "http://x/"))
    fails(3, "DNS", "no-such-host.invalid", "host name", doctor("--url", "amqp://no-such-host.invalid/"))
    fails(3, "TCP", "refused", "nothing listens", doctor("--url", "amqp://127.0.0.1:1/"))
    local server = require "moonrabbit.net".listen("127.0.0.1", 0)
    local silent = "127.0.0.1:" .. server:port() .. "/"
    fails(3, "protocol", "says nothing", "no AMQP broker", doctor("--timeout", "1", "--url", "amqp://" .. silent))
    fails(3, "TLS", "within 1 s", "TLS port", doctor("--timeout", "1", "--url", "amqps://" .. silent))
    server:close()
    fails(4, "login", "refused", "wrong password",
      doctor("--url", ("amqp://guest:%s@%s:%d/"):format(SECRET, host, port)))
    fails(2, "URL", "frame_max", "percent", doctor("--url", ("amqp://%s:%d/?frame_max=100"):format(host, port)))
    fails(4, "login", "does not offer EXTERNAL", "auth_mechanism_ssl",
      doctor("--url", ("amqp://%s:%d/?auth_mechanism=external"):format(host, port)))
    fails(4, "vhost", "nowhere", "list_vhosts",
      doctor("--url", ("amqp://guest:guest@%s:%d/nowhere"):format(host, port)))
  end)

  it("knows an HTTP port", function()
    local address = os.getenv "AMQP_MANAGEMENT_URL"
    if not address then pending "no management plugin" return end
    local where = address:match "@(.*)$"
    fails(3, "protocol", "HTTP server", "5672", doctor("--url", "amqp://" .. where .. "/"))
    fails(3, "TLS", "TLS", "HTTP port", doctor("--url", "amqps://" .. where .. "/"))
  end)

  it("tells what a user may not do", function()
    if not os.getenv "MOONRABBIT_BROKER" or not management("PUT", "/api/users/spec-nobody",
      ('{"password":"%s","tags":""}'):format(SECRET)) then
      pending "needs the management plugin of a private broker"
      return
    end
    finally(function() management("DELETE", "/api/users/spec-nobody") end)
    local own = ("amqp://spec-nobody:%s@%s:%d/"):format(SECRET, host, port)
    fails(4, "vhost", "vhost", "set_permissions", doctor("--url", own))
    management("PUT", "/api/permissions/%2f/spec-nobody", '{"configure":"^amq.gen","write":"","read":".*"}')
    fails(4, "permissions", "no permission to write", "set_permissions", doctor("--url", own))
    management("PUT", "/api/permissions/%2f/spec-nobody", '{"configure":"","write":"","read":""}')
    fails(4, "permissions", "no permission to configure, write", "set_permissions", doctor("--url", own))
    one_line(4, "ACCESS_REFUSED", moonrabbit("declare", "queue", "x", "--url", own))
  end)

  describe("with TLS", function()
    local secure, folder = os.getenv "AMQPS_URL", os.getenv "MOONRABBIT_TLS_DIR"

    local function it_with_tls(name, fn)
      it(name, function()
        if not secure or not folder then pending "needs a broker with TLS" return end
        fn(secure:match "@(.*)$", folder)
      end)
    end

    it_with_tls("verifies", function(where, dir)
      local out = ok(doctor("--url", "amqps://guest:guest@" .. where, "--ca", dir .. "/ca.pem"))
      assert.truthy(out:find "✓ TLS +TLSv1%.%d [^\n]*verified", out)
      local insecure = ok(doctor("--url", "amqps://guest:guest@" .. where, "--insecure"))
      assert.truthy(insecure:find("NOTHING VERIFIED", 1, true))
      assert.equal("exchange amq.direct\n", ok(moonrabbit("declare", "exchange", "amq.direct", "--passive", "--url",
        "amqps://guest:guest@" .. where, "--ca", dir .. "/ca.pem")))
    end)

    it_with_tls("tells an untrusted certificate from a wrong name", function(where, dir)
      fails(3, "TLS", "verify failed", "--ca", doctor("--url", "amqps://guest:guest@" .. where))
      fails(3, "TLS", "verify failed", "--ca", doctor("--url", "amqps://guest:guest@" .. where, "--ca",
        dir .. "/other-ca.pem"))
      fails(3, "TLS", "host name mismatch", "--server-name", doctor("--url", "amqps://guest:guest@" .. where, "--ca",
        dir .. "/ca.pem", "--server-name", "elsewhere.example"))
      fails(2, "TLS", "", "--ca", doctor("--url", "amqps://guest:guest@" .. where, "--ca", "/nothing-there"))
      one_line(3, "verify failed", moonrabbit("purge", "q", "--url", "amqps://guest:guest@" .. where))
    end)

    it_with_tls("tells a TLS port spoken plain, and the other way round", function(where)
      fails(3, "protocol", "speaks TLS", "amqps://", doctor("--url", "amqp://guest:guest@" .. where))
      fails(3, "TLS", "does not speak TLS", "amqp://",
        doctor("--url", ("amqps://guest:guest@%s:%d/"):format(host, port)))
    end)
  end)
end)

describe("moonrabbit's output #smoke", function()
  it("never holds a password", function()
    assert.truthy(#printed > 10)
    for _, text in ipairs(printed) do
      assert.falsy(text:find(SECRET, 1, true), text)
      assert.falsy(text:find("guest:guest@" .. host, 1, true), text)
    end
  end)
end)
