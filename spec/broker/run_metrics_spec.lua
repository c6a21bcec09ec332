-- moonrabbit run: --metrics, --log-format, --env.
local broker = require "support.broker"
local http = require "support.http"
local json = require "moonrabbit.cli.json"
local life = require "support.life"
local process = require "support.process"

local script = [[
local mr = require "moonrabbit"
BEFORE
return mr.app {
  name = "$NAME", CONNECT
  queues = { ["$QUEUE"] = {} },
  consumers = { { queue = "$QUEUE", FIELDS
    handler = function(msg, app) BODY end } },
}
]]

local function text(parts)
  return (script:gsub("%u+", function(word)
    if word == "NAME" or word == "QUEUE" then return nil end
    return parts[word:lower()] or ""
  end))
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

  local function publish(count, more)
    for i = 1, count do
      local opts = { message_id = "id-" .. i }
      for name, value in pairs(more or {}) do opts[name] = value end
      bench:publish("precious-body", opts)
    end
  end

  local function port_of(running)
    life.said(running, "/metrics")
    return tonumber(running:err():match "http://127%.0%.0%.1:(%d+)/metrics")
  end

  local function sample(port, name, labels)
    local _, page = http.get(port, "/metrics")
    local list = {}
    for _, pair in ipairs(labels or { { "queue", bench.queue } }) do
      list[#list + 1] = ('%s="%s"'):format(pair[1], pair[2])
    end
    return http.sample(page, ("moonrabbit_%s{%s}"):format(name, table.concat(list, ",")))
  end

  local function ends(running, code)
    running:signal "TERM"
    assert.equal(code or 0, life.ended(running))
  end

  describe("--metrics", function()
    it("serves what the app does, and whether it is ready; a reload keeps the counters", function()
      local body = "app.metrics.registry:counter('own_total', 'Own.'):with():inc()"
        .. " return app:publish('x', { mandatory = false, routing_key = 'nobody' })"
      bench:write("app.lua", text { body = body })
      local running = bench:start { "--metrics", "127.0.0.1:0" }
      local port = port_of(running)
      broker.eventually(function() return http.get(port, "/readyz") == 200 end)
      assert.equal(200, (http.get(port, "/healthz")))
      publish(5)
      local function settled() return sample(port, "messages_settled_total",
        { { "queue", bench.queue }, { "outcome", "ok" } }) end
      broker.eventually(function() return settled() == 5 end)
      running:signal "HUP"
      life.said(running, "reloaded")
      publish(3)
      broker.eventually(function() return settled() == 8 end)
      bench:write("app.lua", "return 42\n")
      running:signal "HUP"
      life.said(running, "the old script goes on")
      local _, page = http.get(port, "/metrics")
      assert.equal(8, http.sample(page, "own_total"))
      assert.equal(1, http.sample(page, 'moonrabbit_reloads_total{result="ok"}'))
      assert.equal(1, http.sample(page, 'moonrabbit_reloads_total{result="failed"}'))
      assert.equal(8, http.sample(page, ('moonrabbit_publishes_total{publisher="%s"}'):format(bench.name)))
      assert.equal(0, http.sample(page, ('moonrabbit_messages_in_flight{queue="%s"}'):format(bench.queue)))
      for _, role in ipairs { "consume", "publish" } do
        assert.equal(1, http.sample(page, ('moonrabbit_connection_up{connection="%s (%s)"}'):format(bench.name, role)))
      end
      ends(running)
    end)

    it("counts a handler that never returns as failed, once, and takes no late result", function()
      local body = "if msg.body == 'good' then return end for _ = 1, 3 do mr.pcall(mr.sleep, 600) end"
        .. " app.metrics.registry:counter('late_total', 'Late.'):with():inc()"
      bench:write("app.lua", text { body = body, fields = "timeout = 0.3," })
      local running = bench:start { "--metrics", "127.0.0.1:0" }
      local port = port_of(running)
      broker.eventually(function() return http.get(port, "/readyz") == 200 end)
      publish(1)
      local function settled(outcome) return sample(port, "messages_settled_total",
        { { "queue", bench.queue }, { "outcome", outcome } }) end
      broker.eventually(function() return settled "dead_letter" == 1 end)
      bench:publish "good"
      broker.eventually(function() return settled "ok" == 1 end)
      assert.equal(1, sample(port, "handler_failures_total", { { "queue", bench.queue }, { "kind", "timeout" } }))
      local function parked()
        return broker.ok(bench.channel:queue_declare(bench.name .. ".dead", { passive = true })).message_count
      end
      assert.equal(1, parked())
      ends(running) -- long before its 30 s are over: nobody waits for a handler whose message has its outcome
      assert.same({ 1, 0 }, { parked(),
        broker.ok(bench.channel:queue_declare(bench.queue, { passive = true })).message_count })
    end)

    it("says that it is not ready while the broker is away, and healthy", function()
      bench:write("app.lua", text {})
      local running = bench:start({ "--metrics", "[::1]:0" }, { AMQP_URL = "amqp://127.0.0.1:1/" })
      life.said(running, "/metrics")
      local port = tonumber(running:err():match "http://%[::1%]:(%d+)/metrics")
      local status, answer = http.get({ host = "::1", port = port }, "/readyz")
      assert.equal(503, status)
      assert.truthy(answer:find('"reason":"starting"', 1, true), answer)
      assert.equal(200, (http.get({ host = "::1", port = port }, "/healthz")))
      ends(running)
    end)

    it("is on a unix socket, in the place of one that was left behind", function()
      bench:write("app.lua", text {})
      local path = bench:path "metrics.sock"
      local first = bench:start { "--metrics", path }
      life.said(first, "runs")
      local second = bench:start { "--metrics", path }
      assert.equal(1, life.ended(second))
      first:signal "KILL"
      life.ended(first)
      local third = bench:start { "--metrics", path }
      life.said(third, "runs")
      assert.equal(200, (http.get(path, "/readyz")))
      ends(third)
      assert.is_nil(process.slurp(path))
    end)

    it("says what it cannot listen on, before it connects", function()
      bench:write("app.lua", text {})
      local taken = assert(require("moonrabbit.runtime.native").listen("127.0.0.1", 0))
      local file = bench:write("file", "precious")
      for _, case in ipairs {
        { "127.0.0.1:" .. taken:port(), 1, "cannot listen on 127.0.0.1:" .. taken:port() },
        { "192.0.2.1:9419", 1, "cannot listen on 192.0.2.1:9419" },
        { "nowhere.invalid:9419", 1, "nowhere.invalid is not an address of this machine" },
        { file, 1, "cannot listen on " .. file },
        { "9419", 2, "--metrics takes an address such as" },
        { "127.0.0.1:99999", 2, "--metrics takes an address such as" },
      } do
        local running = bench:start({ "--metrics", case[1] }, { AMQP_URL = "amqp://nowhere.invalid/" })
        assert.equal(case[2], life.ended(running))
        assert.truthy(running:err():find(case[3], 1, true), running:err())
        assert.is_nil(running:err():find("dns", 1, true))
      end
      taken:close()
      assert.equal("precious", process.slurp(file))
    end)
  end)

  describe("--log-format json", function()
    -- Those that are written whole.
    local function lines(running)
      local all = {}
      for line in running:err():gmatch "([^\n]+)\n" do all[#all + 1] = assert(json.decode(line), line) end
      return all
    end

    local function line_of(running, start)
      for _, line in ipairs(lines(running)) do
        if line.message:find(start, 1, true) == 1 then return line end
      end
    end

    it("tells of failures, retries and dead letters, with what they are about and nothing secret", function()
      bench:write("app.lua", text {
        fields = "retry = mr.retry.constant { delay = 0.01, attempts = 2, jitter = 'none' },",
        body = "error('the bank said no: password=open-sesame', 0)",
      })
      local running = bench:start { "--log-format", "json", "--log-level", "debug" }
      life.said(running, "runs")
      local parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
      publish(1, { headers = { traceparent = parent } })
      local dead = broker.eventually(function() return line_of(running, "a dead letter") end)
      local again = line_of(running, "a message failed, and is tried again")
      local failed = line_of(running, "a run failed")
      for line, level in pairs { [dead] = "error", [again] = "warn", [failed] = "debug" } do
        assert.equal(level, line.level)
        assert.equal("id-1", line.message_id)
        assert.equal(bench.queue, line.queue)
        assert.equal(bench.queue, line.routing_key)
        assert.equal(parent, line.traceparent)
        assert.truthy(line.message:find("the bank said no", 1, true))
      end
      assert.equal(1, again.attempt)
      assert.equal(2, dead.attempt)
      assert.is_nil(running:err():find("open-sesame", 1, true))
      assert.is_nil(running:err():find("precious-body", 1, true))
      ends(running)
      assert.truthy(line_of(running, "stopping"))
    end)

    it("ends with an error as such a line too", function()
      bench:write("app.lua", text {})
      local running = bench:start({ "--log-format", "json" }, { AMQP_URL = broker.uri { password = "open-sesame" } })
      assert.equal(4, life.ended(running))
      local all = lines(running)
      assert.equal("error", all[#all].level)
      assert.is_nil(running:err():find("open-sesame", 1, true))
    end)
  end)

  it("leaves out what is below --log-level", function()
    bench:write("app.lua", text { body = "error('boom', 0)" })
    broker.ok(bench.channel:queue_declare(bench.queue, { durable = true }))
    local running = bench:start { "--log-level", "error" }
    publish(1)
    life.said(running, "a dead letter: boom")
    assert.is_nil(running:err():find("runs", 1, true))
    ends(running)
    for _, words in ipairs { { "--log-level", "loud" }, { "--log-format", "xml" } } do
      local bad = bench:start(words)
      assert.equal(2, life.ended(bad))
    end
  end)

  describe("--env", function()
    local before = "local c = mr.config { default = { n = 1 },\n  production = { n = 2,"
      .. " user = mr.config.env 'SPEC_USER', password = mr.secret.file '$FOLDER/password' } }\n"

    local function write_app(parts)
      parts.before = before
      parts.connect = ("connect = { uri = '%s', user = c.user, password = c.password, reconnect = { max = 0.2 } },")
        :format(parts.uri or broker.url)
      bench:write("app.lua", text(parts))
    end

    local function fails(words, env, said, command)
      local running = bench:start(words, env, command)
      assert.equal(2, life.ended(running))
      assert.truthy(running:err():find(said, 1, true), running:err())
      assert.is_nil(running:err():find("open-sesame", 1, true))
    end

    it("chooses; what is missing is named, before anything is connected", function()
      write_app {}
      local nowhere = { AMQP_URL = "amqp://nowhere.invalid/", SPEC_USER = "x" }
      fails({ "--env", "prod" }, nowhere, "there is no environment 'prod'; there are: default, production")
      fails({ "--env", "production" }, { AMQP_URL = "amqp://nowhere.invalid/" },
        "app.lua:2: mr.config: user: the environment variable SPEC_USER is not set")
      fails({ "--env", "production" }, nowhere, "the secret password: it cannot be read: " .. bench:path "password")
      fails({ "--env", "production", "--check" }, nowhere, bench:path "password")
      fails({ "plan", bench:path "app.lua", "--env", "production" }, nowhere, bench:path "password", "topology")
      fails({ bench:path "app.lua", "--env", "prod" }, nowhere, "there is no environment 'prod'", "explain")
      bench:write("password", "open-sesame\n")
      local running = bench:start({ "--check", "--env", "production" }, nowhere)
      assert.equal(0, life.ended(running))
      assert.is_nil((running:out() .. running:err()):find("open-sesame", 1, true))
      running = bench:start({ bench:path "app.lua", "--env", "production" }, { SPEC_USER = "x" }, "explain")
      assert.equal(0, life.ended(running))
    end)

    it("connects with the file's password of the moment, and MOONRABBIT_ENV chooses too", function()
      local proxy = require("support.proxy").start(broker.parsed().host, broker.parsed().port)
      local p = broker.parsed()
      write_app { uri = ("amqp://127.0.0.1:%d/"):format(proxy.port), body = "print(c.n) io.stdout:flush()" }
      bench:write("password", p.password .. "\n")
      local env = { AMQP_URL = "", SPEC_USER = p.user, MOONRABBIT_ENV = "production" }
      local running = bench:start({}, env)
      life.said(running, "runs")
      os.remove(bench:path "password")
      proxy:cut()
      life.said(running, "the password function gave none: it cannot be read: " .. bench:path "password")
      os.rename(bench:write("whole", p.password .. "\n"), bench:path "password") -- or half of it might be read
      publish(1)
      broker.eventually(function() return running:out():find("2", 1, true) end, 20)
      local plan = bench:start({ "plan", bench:path "app.lua" }, env, "topology")
      assert.equal(0, life.ended(plan))
      assert.truthy(plan:out():find("= queue", 1, true), plan:out() .. plan:err())
      ends(running)
      proxy:stop()
    end)
  end)
end)
