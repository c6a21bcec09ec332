-- A real Prometheus scrapes a client and an app that run against a real broker; and what monitoring/ holds is checked.
local broker = require "support.broker"
local moonrabbit = require "moonrabbit"
local native = require "moonrabbit.runtime.native"
local ports = require "support.ports"
local process = require "support.process"

local metrics = moonrabbit.metrics

local function has(program)
  return process.run({ "sh", "-c", "command -v " .. program }, { raw = true }).code == 0
end

local function run(...) return process.run({ ... }, { raw = true }) end

local function decode(text) return assert(require("moonrabbit.cli.json").decode(text)) end

describe("monitoring/", function()
  local it_checks = broker.it_unless(it, pending, not has "promtool" and "needs promtool" or nil)

  it_checks("has rules that load, and pass their tests", function()
    local result = run("promtool", "check", "rules", "monitoring/rules.yml")
    assert.equal(0, result.code, result.out .. result.err)
    result = run("promtool", "test", "rules", "monitoring/rules_test.yml")
    assert.equal(0, result.code, result.out .. result.err)
  end)

  it_checks("asks only for metrics that there are", function()
    local known = {}
    for _, each in ipairs(require("moonrabbit.metrics.families").list) do known[each[1]] = each[2] end
    for _, file in ipairs { "rules.yml", "grafana-dashboard.json" } do
      for name in process.slurp("monitoring/" .. file):gmatch "moonrabbit_[%l_]+" do
        local base = name:gsub("_bucket$", ""):gsub("_count$", "")
        assert.truthy(known[name] or known[base] == "histogram", file .. ": " .. name)
      end
    end
  end)

  it_checks("has a dashboard whose every expression is one", function()
    local rules = { "groups:", "  - name: panels", "    rules:" }
    for _, panel in ipairs(decode(process.slurp "monitoring/grafana-dashboard.json").panels) do
      for i, target in ipairs(panel.targets) do
        rules[#rules + 1] = ("      - record: panel:p%d_%d\n        expr: '%s'"):format(panel.id, i,
          target.expr:gsub("'", "''"))
      end
    end
    assert.truthy(#rules > 12)
    local path = process.file(table.concat(rules, "\n") .. "\n")
    local result = run("promtool", "check", "rules", path)
    os.remove(path)
    assert.equal(0, result.code, result.out .. result.err)
  end)

  local it_has = broker.it_unless(it, pending, not has "amtool" and "needs amtool" or nil)

  it_has("an Alertmanager's configuration that is one", function()
    local result = run("amtool", "check-config", "monitoring/alertmanager.yml")
    assert.equal(0, result.code, result.out .. result.err)
  end)
end)

describe("Prometheus", function()
  local dir, prometheus, server, port, m, app

  local function get(path)
    local stream = native.open({ host = "127.0.0.1", port = port }, nil, 2)
    if not stream then return "" end
    stream:write("GET " .. path .. " HTTP/1.0\r\nHost: x\r\n\r\n", 2)
    local all = {}
    repeat
      local bytes = stream:read(65536, 5)
      all[#all + 1] = bytes
    until not bytes
    stream:close()
    return table.concat(all):match "\r\n\r\n(.*)$" or ""
  end

  local function encode(text)
    return (text:gsub("[^%w]", function(c) return ("%%%02X"):format(c:byte()) end))
  end

  -- The value of a query with one result.
  local function value_of(query)
    local text = get("/api/v1/query?query=" .. encode(query))
    return tonumber(text:match '"value":%[[%d.e+]+,"([^"]+)"%]')
  end

  local function eventually(query, value)
    local last
    broker.eventually(function()
      last = value_of(query)
      if last == value then return true end
      native.sleep(0.2)
    end, 25, query .. " = " .. value)
  end

  local function start_prometheus()
    dir = os.tmpname()
    os.remove(dir)
    os.execute("mkdir -p " .. dir)
    local function write(name, text)
      local file = assert(io.open(dir .. "/" .. name, "w"))
      file:write(text)
      file:close()
    end
    write("rules.yml", process.slurp "monitoring/rules.yml")
    write("prometheus.yml", ("global: { scrape_interval: 1s, evaluation_interval: 1s }\nrule_files: [rules.yml]\n"
      .. "scrape_configs:\n  - job_name: shop\n    static_configs: [{ targets: ['127.0.0.1:%d'] }]\n"):format(
      server:port()))
    port = ports.free()
    prometheus = process.start({ "prometheus", "--config.file=" .. dir .. "/prometheus.yml",
      "--storage.tsdb.path=" .. dir .. "/data", "--web.listen-address=127.0.0.1:" .. port }, { raw = true })
  end

  teardown(function()
    if app then app:stop(5) end
    if prometheus then
      prometheus:signal "TERM"
      prometheus:wait(10)
      prometheus:stop()
    end
    if server then server:close() end
    broker.close_all()
    if dir then os.execute("rm -rf " .. dir) end
  end)

  local it_scrapes = broker.it_unless(it, pending,
    broker.none() or not has "prometheus" and "needs prometheus" or nil)

  it_scrapes("scrapes a running app, whose numbers are right, and fires an alert", function()
    local queue, shop = broker.unique "signals", broker.unique "shop"
    m = metrics.new()
    local conn = broker.connect()
    m:watch(conn, "client")
    app = moonrabbit.app {
      name = shop, observer = m:observer(), connect = broker.url,
      queues = { [queue] = { auto_delete = true } },
      consumers = { { queue = queue, dead_letter = false, handler = function(message)
        if message.body == "bad" then error "boom" end
      end } },
    }
    assert(app:start { uri = broker.url, log = function() end })
    m:watch_app(app)
    server = assert(metrics.serve { metrics = m, address = "127.0.0.1:0" })
    start_prometheus()
    eventually(('moonrabbit_messages_delivered_total{queue="%s"}'):format(queue), 0)

    local publisher = m:publisher(broker.ok(conn:publisher { routing_key = queue }), "orders")
    for _ = 1, 5 do broker.ok(publisher:send "good") end
    broker.ok(publisher:send_async "good"):wait(10)
    broker.ok(publisher:send_async "bad"):wait(10)
    local _, err = publisher:send("x", { routing_key = "no-such-queue" })
    assert.equal("unroutable", err.kind)

    eventually('moonrabbit_publishes_total{publisher="orders"}', 8)
    eventually('moonrabbit_publish_errors_total{publisher="orders",kind="unroutable"}', 1)
    eventually(('moonrabbit_messages_settled_total{queue="%s",outcome="ok"}'):format(queue), 6)
    eventually(('moonrabbit_messages_settled_total{queue="%s",outcome="dead_letter"}'):format(queue), 1)
    eventually(('moonrabbit_handler_failures_total{queue="%s",kind="error"}'):format(queue), 1)
    eventually(('moonrabbit_handler_seconds_count{queue="%s"}'):format(queue), 7)
    eventually("sum(moonrabbit_connection_up)", 3)
    eventually("sum(moonrabbit_connections)", 3)
    eventually('moonrabbit_publish_seconds_count{publisher="orders"} >= bool 5', 1)
    eventually('up{job="shop"}', 1)

    m:observer().canary("pay", "v2", false, 0.1)
    eventually('moonrabbit_canary_rollbacks_total{route="pay"}', 0)
    m:observer().event("canary_rollback", { route = "pay" })
    eventually('ALERTS{alertname="MoonrabbitCanaryRolledBack",alertstate="firing",route="pay"}', 1)
  end)
end)
