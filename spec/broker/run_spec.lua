-- moonrabbit run: as a process, with signals.
local broker = require "support.broker"
local life = require "support.life"
local process = require "support.process"

local script = [[
local mr = require "moonrabbit"
local function note(text)
  local file = io.open("$FOLDER/seen", "a")
  file:write(text, "\n")
  file:close()
end
return mr.app {
  name = "$NAME",
  queues = { ["$QUEUE"] = {} },
  consumers = { { queue = "$QUEUE", concurrency = 8, prefetch = 8, VERSION
    handler = function(msg)
      note("begin " .. msg.body)
      BODY
      note("VERSION_NAME " .. msg.body)
    end } },
}
]]

local function text(version, body, fields)
  return (script:gsub("VERSION_NAME", version):gsub("VERSION", fields or ""):gsub("BODY", body or ""))
end

describe("moonrabbit run", function()
  local it = broker.it_unless(it, pending, broker.none())
  local bench

  before_each(function()
    bench = life.new()
    bench:connect()
  end)

  after_each(function()
    bench:stop()
    bench:clean()
  end)

  local function publish(from, to)
    for i = from, to or from do bench:publish(tostring(i)) end
  end

  local function seen(word)
    local count, all = 0, {}
    for _, line in ipairs(bench:lines "seen") do
      local n = line:match("^" .. word .. " (%d+)$")
      if n then
        count = count + 1
        all[tonumber(n)] = true
      end
    end
    return count, all
  end

  local function left()
    local found = broker.ok(bench.channel:queue_declare(bench.queue, { passive = true }))
    return found.message_count
  end

  it("checks a script without a broker", function()
    bench:write("app.lua", text("one"))
    local running = bench:start({ "--check" }, { AMQP_URL = "amqp://nowhere.invalid/" })
    assert.equal(0, life.ended(running))
    assert.truthy(running:out():find("is sound", 1, true))
  end)

  it("says where a broken script is wrong, and connects nowhere", function()
    local cases = {
      { "local x = = 1\n", "app.lua:1:" },
      { "\nerror 'boom'\n", "app.lua:2: boom" },
      { "return 42\n", "the script returned a number, and no app" },
      { "local mr = require 'moonrabbit'\n\nreturn mr.app { name = 'x', consumer = {} }\n", "app.lua:3: mr.app: " },
      { "\nrequire 'moonrabbit_nothing'\n", "moonrabbit_nothing" },
    }
    for _, case in ipairs(cases) do
      bench:write("app.lua", case[1])
      local running = bench:start({}, { AMQP_URL = "amqp://nowhere.invalid/" })
      assert.equal(2, life.ended(running))
      assert.truthy(running:err():find(case[2], 1, true), running:err())
    end
  end)

  it("ends with 4 where the password is wrong, and does not repeat it", function()
    bench:write("app.lua", text("one"))
    local running = bench:start({}, { AMQP_URL = broker.uri { password = "open-sesame" } })
    assert.equal(4, life.ended(running))
    assert.is_nil(running:err():find("open-sesame", 1, true))
  end)

  it("waits while the broker is away, and stops meanwhile", function()
    bench:write("app.lua", text("one"))
    local running = bench:start({}, { AMQP_URL = "amqp://127.0.0.1:1/" })
    life.said(running, "trying again")
    running:signal "TERM"
    assert.equal(0, life.ended(running))
  end)

  it("ends with 1 where a queue is there with other properties", function()
    broker.ok(bench.channel:queue_declare(bench.queue, { durable = false, auto_delete = false }))
    bench:write("app.lua", text("one"))
    local running = bench:start()
    assert.equal(1, life.ended(running))
    assert.truthy(running:err():find(bench.queue, 1, true))
  end)

  it("ends with 4 where the vhost is unknown, or the user may not declare", function()
    bench:write("app.lua", text("one"))
    local running = bench:start({}, { AMQP_URL = broker.uri { vhost = "nowhere-" .. bench.name } })
    assert.equal(4, life.ended(running))
    local url = os.getenv "AMQP_MANAGEMENT_URL"
    if not url then return end
    local api = broker.management()
    broker.ok(api:set_user(bench.name, { password = "open-sesame" }))
    finally(function() api:delete_user(bench.name) end)
    broker.ok(api:set_permissions("/", bench.name, { configure = "" }))
    running = bench:start({}, { AMQP_URL = broker.uri { user = bench.name, password = "open-sesame" } })
    assert.equal(4, life.ended(running))
    assert.truthy(running:err():find("ACCESS_REFUSED", 1, true), running:err())
    assert.is_nil(running:err():find("open-sesame", 1, true))
  end)

  it("ends with 3 where the certificate is not trusted, and runs with the script's CA", function()
    if not broker.tls_url then return pending "AMQPS_URL is not set: no broker with TLS" end
    bench:write("app.lua", text("one"))
    for _, words in ipairs { {}, { "--workers", "2" } } do
      local running = bench:start(words, { AMQP_URL = broker.tls_url })
      assert.equal(3, life.ended(running))
      assert.truthy(running:err():find("verify failed", 1, true), running:err())
    end
    -- The URL says where, the script whom it trusts.
    local connect = ("connect = { uri = 'amqps://nowhere.invalid/', tls = { ca = '%s/ca.pem' } },")
      :format(broker.tls_dir)
    bench:write("app.lua", (text("one"):gsub("  queues", "  " .. connect .. "\n  queues", 1)))
    local running = bench:start({}, { AMQP_URL = broker.tls_url })
    life.said(running, "runs")
    running:signal "TERM"
    assert.equal(0, life.ended(running))
  end)

  it("ends with 2, before it connects, where the pid file cannot be written", function()
    bench:write("app.lua", text("one"))
    for _, words in ipairs { {}, { "--workers", "2" } } do
      words[#words + 1] = "--pid-file"
      words[#words + 1] = bench:path "none/pid"
      local running = bench:start(words, { AMQP_URL = "amqp://nowhere.invalid/" })
      assert.equal(2, life.ended(running))
      assert.truthy(running:err():find("the pid file cannot be written", 1, true), running:err())
    end
  end)

  for _, name in ipairs { "TERM", "INT" } do
    it("drains what has arrived on SIG" .. name, function()
      bench:write("app.lua", text("one", "while not io.open('$FOLDER/go') do mr.sleep(0.02) end"))
      local running = bench:start { "--pid-file", bench:path "pid" }
      life.said(running, "runs")
      assert.equal(tostring(running.pid), process.slurp(bench:path "pid"):match "%d+")
      publish(1, 5)
      broker.eventually(function() return seen "begin" == 5 end)
      running:signal(name)
      life.said(running, "stopping")
      bench:write("go", "")
      assert.equal(0, life.ended(running))
      assert.equal(5, (seen "one"))
      assert.equal(0, left())
      assert.is_nil(process.slurp(bench:path "pid"))
    end)
  end

  it("gives back what is not done within --drain, and ends with 1", function()
    bench:write("app.lua", text("one", "mr.sleep(600)"))
    local running = bench:start { "--drain", "0.2" }
    life.said(running, "runs")
    publish(1, 3)
    broker.eventually(function() return seen "begin" == 3 end)
    running:signal "TERM"
    assert.equal(1, life.ended(running))
    broker.eventually(function() return left() == 3 end)
  end)

  it("ends at once on a second signal, even under a handler that never yields", function()
    bench:write("app.lua", text("one", "while true do end"))
    local running = bench:start()
    life.said(running, "runs")
    publish(1)
    broker.eventually(function() return seen "begin" == 1 end)
    running:signal "TERM"
    running:signal "INT"
    local code = life.ended(running)
    assert.truthy(code == 130 or code == 143, code)
    broker.eventually(function() return left() == 1 end)
  end)

  it("goes on with the old script when the new one is broken", function()
    bench:write("app.lua", text("one"))
    local running = bench:start()
    life.said(running, "runs")
    bench:write("app.lua", "return 42\n")
    running:signal "HUP"
    life.said(running, "the old script goes on")
    publish(1)
    broker.eventually(function() return seen "one" == 1 end)
    running:signal "TERM"
    assert.equal(0, life.ended(running))
  end)

  it("loads the script's own modules again, and keeps the old ones when it is broken", function()
    local app = text("one", "note('module ' .. require('own').number)")
    bench:write("own.lua", "return { number = 1 }\n")
    bench:write("app.lua", "require 'own'\n" .. app)
    local running = bench:start()
    life.said(running, "runs")
    bench:write("own.lua", "return { number = 2 }\n")
    bench:write("app.lua", "require 'own'\nerror 'no'\n")
    running:signal "HUP"
    life.said(running, "the old script goes on")
    publish(1)
    broker.eventually(function() return seen "module" == 1 end)
    assert.is_true(select(2, seen "module")[1])
    bench:write("app.lua", "require 'own'\n" .. app)
    running:signal "HUP"
    life.said(running, "info  reloaded")
    publish(2)
    broker.eventually(function() return seen "module" == 2 end)
    assert.is_true(select(2, seen "module")[2])
    running:signal "TERM"
    assert.equal(0, life.ended(running))
  end)

  it("reloads under load: nothing is lost, what is in flight ends under the old script", function()
    local fields = "dedupe = mr.dedupe.memory { ttl = 600 },"
    bench:write("app.lua", text("one", "mr.sleep(0.01)", fields))
    local running = bench:start()
    life.said(running, "runs")
    local total = 300
    for i = 1, total do
      bench:publish(tostring(i), { message_id = tostring(i) })
      if i == 100 or i == 200 then
        bench:write("app.lua", text(i == 100 and "two" or "three", "mr.sleep(0.01)", fields))
        running:signal "HUP"
        broker.eventually(function()
          local _, count = running:err():gsub("reloaded", "")
          return count == i / 100
        end, 20, "reload")
      end
    end
    broker.eventually(function() return (seen "one") + (seen "two") + (seen "three") >= total end, 30, "all handled")
    -- Those that the old script has done are known to the new one.
    for _, i in ipairs { 1, 50, 150 } do
      bench:publish(tostring(i), { message_id = tostring(i) })
    end
    publish(total + 1) -- comes after them
    broker.eventually(function() return select(2, seen "three")[total + 1] end)
    running:signal "TERM"
    assert.equal(0, life.ended(running))
    local done = {}
    for _, word in ipairs { "one", "two", "three" } do
      local count, all = seen(word)
      assert.truthy(count > 0, word)
      for n in pairs(all) do
        assert.is_nil(done[n], n)
        done[n] = true
      end
    end
    assert.equal(total + 1, #done)
    assert.equal(0, left())
  end)

  it("tells systemd that it is ready, alive, reloading and stopping", function()
    local found, unix = pcall(require, "socket.unix")
    if not found or type(unix) ~= "table" or not unix.dgram then return pending "needs LuaSocket's unix datagrams" end
    local path, heard = bench:path "notify", {}
    local socket = assert(unix.dgram())
    assert(socket:bind(path))
    socket:settimeout(0)
    local function hears(wanted)
      broker.eventually(function()
        local bytes = socket:receive()
        if bytes then heard[#heard + 1] = bytes end
        return bytes and bytes:find(wanted, 1, true) == 1
      end, 20, wanted)
    end
    bench:write("app.lua", text("one"))
    local running = bench:start({}, { NOTIFY_SOCKET = path, WATCHDOG_USEC = "2000000" }) -- few: the socket holds ten
    hears "READY=1"
    hears "WATCHDOG=1"
    running:signal "HUP"
    hears "RELOADING=1\nMONOTONIC_USEC="
    hears "READY=1"
    running:signal "TERM"
    hears "STOPPING=1"
    assert.equal(0, life.ended(running))
    socket:close()
  end)
end)
