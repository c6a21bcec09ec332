-- The examples of units: examples/systemd and examples/kubernetes are what they are taken for, and call `moonrabbit run` with
-- options that it has.
local process = require "support.process"

local function has(program)
  return process.run({ "sh", "-c", "command -v " .. program }, { raw = true }).code == 0
end

local UNIT, MANIFEST = "examples/systemd/orders.service", "examples/kubernetes/orders.yaml"
local GRACE = require("moonrabbit.life.crew").GRACE

local script = "return require 'moonrabbit'.app { name = 'orders', queues = { q = {} },"
  .. " consumers = { { queue = 'q', handler = print } } }"

-- The words after `run`, tried with --check and a script that is there.
local function check(words)
  local path = process.file(script)
  local all, seen = { "bin/moonrabbit" }, false
  for _, word in ipairs(words) do
    if word:find "/orders%.lua$" then word, seen = path, true end
    if word ~= "production" and word ~= "--env" then all[#all + 1] = word end -- that script has no environments
  end
  all[#all + 1] = "--check"
  local result = process.run(all, { unset = { "MOONRABBIT_ENV" } })
  os.remove(path)
  assert.is_true(seen)
  assert.equal(0, result.code, table.concat(all, " ") .. "\n" .. result.out .. result.err)
end

local function value_after(words, name)
  for i, word in ipairs(words) do
    if word == name then return words[i + 1] end
  end
end

local function drain_of(words) return assert(tonumber(value_after(words, "--drain"))) end

describe("examples/systemd/orders.service", function()
  local unit = process.slurp(UNIT)

  local function field(name) return (assert(unit:match("\n" .. name .. "=([^\n]*)"), name)) end

  local function words_of(name)
    local words = {}
    for word in field(name):gmatch "%S+" do words[#words + 1] = word end
    assert.equal("/usr/local/bin/moonrabbit", table.remove(words, 1))
    return words
  end

  it("starts moonrabbit with options that it has", function()
    check(words_of "ExecStart")
    check(words_of "ExecStartPre")
  end)

  it("waits longer than a drain, and restarts on no exit code that would come again", function()
    local words = words_of "ExecStart"
    assert.truthy(tonumber(field "TimeoutStopSec") > drain_of(words) + GRACE)
    local exit = require "moonrabbit.cli.exit"
    assert.equal(("%d %d"):format(exit.usage, exit.denied), field "RestartPreventExitStatus")
    assert.equal("notify", field "Type")
    assert.equal("mixed", field "KillMode")
  end)

  local it_verifies = has "systemd-analyze" and it or function(name) pending(name .. ": needs systemd-analyze") end

  it_verifies("is a unit without a complaint of systemd's", function()
    local folder = os.tmpname()
    os.remove(folder)
    os.execute("mkdir " .. folder)
    local path = folder .. "/orders.service"
    local file = assert(io.open(path, "w"))
    file:write((unit:gsub("/usr/local/bin/moonrabbit", "/bin/true"))) -- it looks whether the program is there
    file:close()
    local result = process.run({ "systemd-analyze", "verify", "--man=no", path }, { raw = true })
    os.execute("rm -r " .. folder)
    local about_us = {}
    for line in (result.out .. result.err):gmatch "[^\n]+" do
      if line:find("orders.service", 1, true) then about_us[#about_us + 1] = line end
    end
    assert.same({}, about_us)
  end)
end)

describe("examples/kubernetes/orders.yaml", function()
  local manifest = process.slurp(MANIFEST)

  local function all_args()
    local list = {}
    for text in manifest:gmatch "args: %[(.-)%]" do
      local words = {}
      for word in text:gmatch '"([^"]*)"' do words[#words + 1] = word end
      list[#list + 1] = words
    end
    return list
  end

  it("starts moonrabbit with options that it has", function()
    local list = all_args()
    assert.equal(2, #list)
    for _, words in ipairs(list) do check(words) end
  end)

  it("waits longer than a drain, and asks where the metrics are", function()
    local words = all_args()[2]
    assert.truthy(tonumber(manifest:match "terminationGracePeriodSeconds: (%d+)") > drain_of(words) + GRACE)
    local port = value_after(words, "--metrics"):match "^0%.0%.0%.0:(%d+)$"
    assert.equal(port, manifest:match "containerPort: (%d+)")
    assert.equal(port, manifest:match 'prometheus.io/port: "(%d+)"')
    for probe, path in pairs { readinessProbe = "/readyz", livenessProbe = "/healthz" } do
      assert.equal(path, manifest:match(probe .. ": { httpGet: { path: (%S+), port: metrics }"))
    end
  end)

  local readers = { { "ruby", "-ryaml", "-e" }, { "python3", "-c" } }
  local programs = {
    ruby = "d = YAML.load_file(ARGV[0], aliases: true); c = d['spec']['template']['spec']['containers'];"
      .. " print d['kind'], ' ', c.size, ' ', c[0]['volumeMounts'].size",
    python3 = "import sys, yaml; d = yaml.safe_load(open(sys.argv[1])); c = d['spec']['template']['spec']"
      .. "['containers']; print(d['kind'], len(c), len(c[0]['volumeMounts']), end='')",
  }

  it("is YAML, of one deployment", function()
    for _, words in ipairs(readers) do
      local all = {}
      for i, word in ipairs(words) do all[i] = word end
      all[#all + 1] = programs[words[1]]
      all[#all + 1] = MANIFEST
      local result = process.run(all, { raw = true, unset = { "LD_PRELOAD" } })
      if result.code == 0 then
        assert.equal("Deployment 1 2", result.out)
        return
      end
    end
    pending "needs ruby, or python3 with yaml"
  end)
end)
