-- moonrabbit doctor --app: what of a broker does not suit an app.
local broker = require "support.broker"
local cjson = require "moonrabbit.cli.json"
local life = require "support.life"
local process = require "support.process"

local script = [[
local mr = require "moonrabbit"
return mr.app {
  name = "$NAME", MORE
  exchanges = { ["$NAME.x"] = { type = "topic" } },
  queues = { ["$QUEUE"] = { KIND bind = { { "$NAME.x", "order.#" } } } },
  consumers = { { queue = "$QUEUE", handler = function() end, retry = mr.retry.steps { 5 } } },
}
]]

describe("moonrabbit doctor --app", function()
  local it = broker.it_unless(it, pending, broker.none())
  local bench, ch

  local function write(parts)
    parts = parts or {}
    bench:write("app.lua", (script:gsub("MORE", function() return parts.more or "" end):gsub("KIND", function()
      return parts.kind or ""
    end)))
  end

  before_each(function()
    bench = life.new()
    write()
    ch = broker.ok(broker.connect():channel())
  end)

  after_each(function()
    bench:stop()
    bench:clean(".x", ".wait.5s")
  end)

  local function run(words, env)
    env = env or {}
    env.AMQP_URL = env.AMQP_URL or broker.url
    return process.run(words, { env = env })
  end

  local function doctor(words, env)
    local all = { "bin/moonrabbit", "doctor", "--rounds", "1", "--app", bench:path "app.lua" }
    for _, word in ipairs(words or {}) do all[#all + 1] = word end
    return run(all, env)
  end

  -- The step's lines, as { ok, text, advice }.
  local function step(result, name)
    local found, last = {}, nil
    for line in result.out:gmatch "[^\n]+" do
      local mark, of, text = line:match "^(%S+) (%l[%l ]-)  +(.*)$"
      if not mark then mark, of, text = line:match "^(%S+) (%l+) (.*)$" end
      if mark then
        last = { ok = mark == "✓", text = text }
        if of == name then found[#found + 1] = last end
      elseif last then
        last.advice = line:match "^%s+→ (.*)$" or last.advice
      end
    end
    return found
  end

  local function finds(result, name, text, advice)
    for _, each in ipairs(step(result, name)) do
      if not each.ok and each.text:find(text, 1, true) then
        assert.truthy(not advice or each.advice and each.advice:find(advice, 1, true), result.out)
        return
      end
    end
    error(("no ✗ %s with '%s': %s%s"):format(name, text, result.out, result.err), 2)
  end

  local function nothing_was_made()
    local channel = broker.ok(broker.connect():channel())
    assert.is_nil((channel:queue_declare(bench.queue, { passive = true })))
    channel = broker.ok(broker.connect():channel())
    assert.is_nil((channel:exchange_declare(bench.name .. ".home", { passive = true })))
  end

  it("finds a broker well where nothing is there yet, makes nothing, and so it is when all is there", function()
    local first = doctor()
    assert.equal(0, first.code, first.out .. first.err)
    assert.falsy(first.out:find("✗", 1, true), first.out)
    assert.truthy(step(first, "app")[1].text:find("is sound, 1 consumers", 1, true), first.out)
    assert.truthy(step(first, "topology")[1].text:find "^0 as declared, %d+ missing %(the app declares them%)")
    nothing_was_made()
    assert.equal(0, run({ "bin/moonrabbit", "topology", "apply", bench:path "app.lua" }).code)
    local second = doctor()
    assert.equal(0, second.code, second.out)
    assert.truthy(step(second, "topology")[1].text:find(", 0 missing", 1, true), second.out)
    assert.truthy(step(second, "permissions")[1].ok)
  end)

  it("says it in JSON", function()
    local result = doctor { "--json" }
    local report = assert(cjson.decode(result.out))
    local by_name = {}
    for _, each in ipairs(report.steps) do by_name[each.step] = each end
    assert.equal(bench.name, by_name.app.data.app)
    assert.equal(0, by_name.topology.data.same)
    assert.is_true(by_name.permissions.ok)
    assert.is_false(by_name.retries.data.management)
  end)

  it("ends with 2 where the script is broken or a secret is missing, and connects nowhere", function()
    local nowhere = { AMQP_URL = "amqp://nowhere.invalid/" }
    bench:write("app.lua", "\nerror 'boom'\n")
    local result = doctor({}, nowhere)
    assert.equal(2, result.code, result.out)
    finds(result, "app", "app.lua:2: boom", "run --check")
    write { more = "connect = { password = mr.secret.file '$FOLDER/password' }," }
    result = doctor({}, nowhere)
    assert.equal(2, result.code, result.out)
    finds(result, "app", "password")
    assert.is_nil(result.out:find("nowhere", 1, true))
  end)

  it("connects where the script says, with the secret that it names", function()
    local p = broker.parsed()
    write { more = ("connect = { uri = 'amqp://%s:%d/', user = '%s', password = mr.secret.file '$FOLDER/password' },")
      :format(p.host, p.port, p.user) }
    bench:write("password", "open-sesame\n")
    local result = doctor({}, { AMQP_URL = "", MOONRABBIT_URL = "" })
    assert.equal(4, result.code, result.out)
    assert.truthy(result.out:find("(from the script)", 1, true), result.out)
    assert.is_nil((result.out .. result.err):find("open-sesame", 1, true))
    bench:write("password", p.password .. "\n")
    assert.equal(0, doctor({}, { AMQP_URL = "", MOONRABBIT_URL = "" }).code)
  end)

  describe("of several endpoints", function()
    local here, nowhere, inside

    before_each(function()
      local p = broker.parsed()
      here, nowhere = ("%s:%d"):format(p.host, p.port), "127.0.0.1:1"
      inside = { AMQP_URL = "", MOONRABBIT_URL = "" }
    end)

    local function connects(text) write { more = ("connect = { %s },"):format(text) } end

    local function list(...)
      local uris = {}
      for i, each in ipairs { ... } do uris[i] = ("'amqp://%s/'"):format(each) end
      return ("endpoints = { %s }"):format(table.concat(uris, ", "))
    end

    local function steps_at(report, endpoint)
      local found, failed = {}, nil
      for _, each in ipairs(report.steps) do
        if each.endpoint == endpoint then
          found[#found + 1] = each.step
          if not each.ok then failed = each.step end
        end
      end
      return table.concat(found, " "), failed
    end

    it("looks at each, and names those that cannot be used", function()
      connects(list("guest:guest@" .. here, nowhere))
      local result = doctor({}, inside)
      assert.equal(3, result.code, result.out)
      assert.truthy(result.out:find("• endpoint    1 of 2: " .. here, 1, true), result.out)
      assert.truthy(result.out:find("• endpoint    2 of 2: " .. nowhere .. "\n✓ URL", 1, true), result.out)
      assert.truthy(result.out:find("✗ TCP         " .. nowhere, 1, true), result.out)
      finds(result, "endpoints", "1 of 2 cannot be used: " .. nowhere, "would not get in")
    end)

    it("looks at what the app needs where it gets in first, and once", function()
      connects(list(nowhere, "guest:wrong-word@" .. here, "guest:guest@" .. here, "guest:guest@" .. here))
      local result = doctor({ "--json" }, inside)
      assert.equal(3, result.code, result.out)
      local report = assert(cjson.decode(result.out))
      local found, failed = steps_at(report, nowhere)
      assert.equal("URL DNS TCP", found)
      assert.equal("TCP", failed)
      found, failed = steps_at(report, here)
      local reach, session = "URL DNS TCP TLS protocol login", " vhost versions tuned round trip"
      assert.equal(reach .. " " .. reach .. session .. " topology permissions retries " .. reach .. session, found)
      assert.equal("login", failed)
      assert.equal("endpoints", report.steps[#report.steps].step)
      assert.same({ nowhere, here }, report.steps[#report.steps].data.unusable)
      assert.is_nil((result.out .. result.err):find("wrong-word", 1, true))
    end)

    it("is content where all can be used, and says only what is not with --quiet", function()
      connects(list("guest:guest@" .. here, "guest:guest@" .. here))
      local result = doctor({}, inside)
      assert.equal(0, result.code, result.out)
      assert.truthy(step(result, "endpoints")[1].text:find("all 2", 1, true), result.out)
      assert.equal("", doctor({ "--quiet" }, inside).out)
      connects(list("guest:guest@" .. here, nowhere))
      local quiet = doctor({ "--quiet" }, inside).out
      assert.truthy(quiet:find "^• endpoint    2 of 2: [^\n]+\n✗ TCP", quiet)
    end)

    it("looks at both sites, each with its own user, and at what the app needs in each", function()
      bench:write("password", "guest\n")
      connects(("sites = { primary = { uri = 'amqp://%s/', password = mr.secret.file '$FOLDER/password' },"
        .. " standby = { endpoints = { 'amqp://%s/', 'amqp://%s/' }, user = 'nobody', password = 'open-sesame' } }")
        :format(here, nowhere, here))
      local result = doctor({ "--json" }, inside)
      assert.equal(3, result.code, result.out)
      local report = assert(cjson.decode(result.out))
      assert.truthy(steps_at(report, "primary " .. here):find("retries", 1, true), result.out)
      local _, failed = steps_at(report, "standby " .. here)
      assert.equal("login", failed)
      assert.same({ "standby " .. nowhere, "standby " .. here }, report.steps[#report.steps].data.unusable)
      assert.is_nil((result.out .. result.err):find("open-sesame", 1, true))
      connects(("sites = { primary = { uri = 'amqp://%s/' }, standby = { uri = 'amqp://%s/' } }"):format(here, here))
      report = assert(cjson.decode(doctor({ "--json" }, inside).out))
      assert.equal(0, report.exit_code)
      assert.truthy(steps_at(report, "standby " .. here):find("retries", 1, true))
    end)

    it("ends with 2 where they make no sense together", function()
      connects(("sites = { primary = { uri = 'amqp://%s/' } }"):format(here))
      local result = doctor({}, inside)
      assert.equal(2, result.code, result.out)
      finds(result, "app", "sites.standby is missing")
    end)
  end)

  it("finds a wait queue that somebody declared otherwise", function()
    broker.ok(ch:queue_declare(bench.name .. ".wait.5s", { durable = true, arguments = { ["x-message-ttl"] = 60000 } }))
    local result = doctor()
    assert.equal(1, result.code, result.out)
    finds(result, "topology", bench.name .. ".wait.5s", "topology plan")
    finds(result, "topology", "PRECONDITION_FAILED")
  end)

  it("takes a dead-letter queue as it is, as the app does", function()
    broker.ok(ch:queue_declare(bench.name .. ".dead", { durable = true, arguments = { ["x-max-length"] = 5 } }))
    local result = doctor()
    assert.equal(0, result.code, result.out)
  end)

  it("finds what nobody declares: passive queues, a ladder that is to exist", function()
    write { kind = "passive = true, ", more = "ladder = { mode = 'existing' }," }
    local result = doctor()
    assert.equal(1, result.code, result.out)
    finds(result, "topology", "queue '" .. bench.queue .. "'")
    finds(result, "topology", bench.name .. ".home", "topology apply")
    write()
    assert.equal(0, run({ "bin/moonrabbit", "topology", "apply", bench:path "app.lua" }).code)
    write { kind = "passive = true, ", more = "ladder = { mode = 'existing' }," }
    result = doctor()
    assert.equal(0, result.code, result.out)
  end)

  it("finds what would disturb retries in the script alone", function()
    write { kind = "type = 'quorum', arguments = { ['x-delivery-limit'] = 3 }, " }
    local result = doctor()
    assert.equal(1, result.code, result.out)
    finds(result, "retries", "gives a message up after 3 returns", "delivery-limit")
  end)

  describe("with the management API", function()
    local url, api = os.getenv "AMQP_MANAGEMENT_URL", nil
    local it = broker.it_unless(it, pending, not url and "needs AMQP_MANAGEMENT_URL" or nil) -- luacheck: ignore 431

    before_each(function() api = broker.management() end)

    -- What the API says may be some seconds old.
    local function comes_to_find(name, text, advice)
      local result
      broker.eventually(function()
        result = doctor { "--management", url }
        for _, each in ipairs(step(result, name)) do
          if not each.ok and each.text:find(text, 1, true) then return true end
        end
      end, 30, text)
      finds(result, name, text, advice)
      assert.is_nil((result.out .. result.err):find("guest:guest", 1, true))
    end

    it("looks at the cluster's nodes also where no endpoint lets it in", function()
      local result = doctor({ "--cluster", "--timeout", "5", "--management", url },
        { AMQP_URL = broker.uri { host = "127.0.0.1", port = 1 } })
      assert.equal(3, result.code, result.out .. result.err)
      assert.equal(1, #step(result, "cluster"), result.out)
      assert.is_true(step(result, "cluster")[1].ok, result.out)
      assert.is_true(#step(result, "node") >= 1)
    end)

    it("finds a policy on the ladder", function()
      assert.equal(0, run({ "bin/moonrabbit", "topology", "apply", bench:path "app.lua" }).code)
      broker.ok(api:set_policy("/", bench.name, { pattern = "^" .. bench.name:gsub("%p", "."), apply_to = "queues",
        definition = { ["message-ttl"] = 1000 } }))
      finally(function() api:delete_policy("/", bench.name) end)
      comes_to_find("retries", bench.name .. ".wait.5s' is under the policy", "list_policies")
    end)

    it("finds orphans, and a queue that is a stream although the script does not say so", function()
      broker.ok(ch:queue_declare(bench.queue, { durable = true, arguments = { ["x-queue-type"] = "stream" } }))
      write { kind = "passive = true, " }
      comes_to_find("retries", "'" .. bench.queue .. "' is a stream")
      assert.equal(0, run({ "bin/moonrabbit", "topology", "apply", bench:path "app.lua" }).code)
      local confirmed = broker.ok(broker.connect():channel { confirm = true })
      broker.ok(confirmed:publish("x", { routing_key = bench.name .. ".orphans" }))
      comes_to_find("retries", "1 messages in '" .. bench.name .. ".orphans'")
    end)

    it("names the rights that the user lacks, each; and no others", function()
      local user = bench.name
      broker.ok(api:set_user(user, { password = "open-sesame" }))
      finally(function() api:delete_user(user) end)
      local as_user = { AMQP_URL = broker.uri { user = user, password = "open-sesame" } }
      local own = "^" .. bench.name:gsub("%p", ".")
      local function may(configure, write_, read)
        broker.ok(api:set_permissions("/", user, { configure = configure, write = write_, read = read }))
        return doctor({}, as_user)
      end
      -- No more than the app's own names, and the default exchange for its dead letters.
      local result = may(own, own .. "|^amq.default$", own)
      assert.equal(0, result.code, result.out)
      nothing_was_made()
      result = may(own, own, own)
      assert.equal(4, result.code, result.out)
      assert.equal("no permission to write amq.default", step(result, "permissions")[1].text)
      result = may("", own .. "|^amq.default$", own)
      assert.equal(4, result.code, result.out)
      finds(result, "permissions", "no permission to configure ", "set_permissions -p '/' " .. user)
      finds(result, "permissions", bench.name .. ".home")
      assert.is_nil(step(result, "permissions")[1].text:find("; to", 1, true), result.out)
      result = may(own, own .. "|^amq.default$", own .. ".(home|orphans|wait|x|dead)")
      finds(result, "permissions", "no permission to read " .. bench.queue)
      -- Nothing is to be configured where everything is there and the ladder is to exist.
      assert.equal(0, run({ "bin/moonrabbit", "topology", "apply", bench:path "app.lua" }).code)
      bench:write("app.lua", "return require 'moonrabbit'.app { name = '$NAME', ladder = { mode = 'existing' },"
        .. " queues = { ['$QUEUE'] = { passive = true } }, consumers = { { queue = '$QUEUE', handler = print,"
        .. " retry = require 'moonrabbit'.retry.steps { 5 } } } }")
      result = may("", own .. ".wait|^amq.default$", "^" .. bench.queue:gsub("%p", "."))
      assert.equal(0, result.code, result.out)
    end)
  end)
end)
