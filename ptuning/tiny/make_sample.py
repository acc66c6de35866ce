"""Write AdvertiseGen/sample/: rows in ADGEN's form that belong to this project.

    cd ptuning && python -m tiny.make_sample        # rebuilds both files byte for byte

Answers to no official file: the official scripts need a download before anything runs. Each row is drawn
from the small grammar below: a kind of product, two to four attributes, and one or two sentences that put every
attribute into words. make_tiny.py uses the same grammar, with other draws, as part of its pretraining text.
"""

import json
import operator
import random
import re
from dataclasses import dataclass
from pathlib import Path

SAMPLE_FOLDER = Path(__file__).resolve().parents[2] / "AdvertiseGen" / "sample"
SEED = 20240607
TRAIN_ROWS, DEV_ROWS = 2400, 240
MIN_CHARACTERS, MAX_CHARACTERS = 30, 90


@dataclass(frozen=True)
class Pool:
    """Values of one attribute with what may be said of each; {v} is the value, {e} one of its effects."""

    key: str
    templates: tuple[str, ...]
    values: dict[str, tuple[str, ...]]
    modifier: str = ""  # how the value stands before the noun, "" where it cannot


@dataclass(frozen=True)
class Kind:
    """A kind of product: its measure word, nouns, forms (attribute `form_key`), pools and group of phrases."""

    measure: str
    nouns: tuple[str, ...]
    form_key: str
    forms: tuple[str, ...]
    pools: tuple[str, ...]
    group: str


# A pool in blocks: its name, its key, its modifier if it has one; the templates; a line for each value and its effects.
POOL_TABLE = """
颜色 颜色 {v}
    {v}的配色{e} 整体选用{v}，{e} {v}为主调，{e} 满眼的{v}{e}
    白色 清爽干净 百搭不挑人 明亮又耐看
    黑色 沉稳大气 低调有质感 耐脏又经典
    红色 热情夺目 喜庆又提气色 一眼就能记住
    蓝色 宁静清透 像晴天一样舒展 冷静又耐看
    绿色 充满生机 看着就很放松 像春天的草地
    粉色 温柔可人 甜而不腻 衬得气色更好
    灰色 内敛高级 怎么搭都不出错 安静又有分寸
    米色 温润柔和 暖意十足 素净又舒服
    紫色 神秘浪漫 格外显眼 多了几分雅致
    棕色 沉静温暖 带着秋天的味道 稳重又踏实
    黄色 活泼亮眼 像阳光一样温暖 让心情也跟着明朗
    藏青色 端庄有度 深沉又显白 正式场合也合适
服饰风格 风格 {v}风
    走的是{v}路线，{e} {v}的风格{e} 一身{v}气息，{e} 带着{v}的味道，{e}
    简约 没有多余的装饰 越看越有味道 干净利落
    复古 仿佛老电影里的画面 藏着旧时光的情调 经得起时间
    文艺 像一首安静的小诗 书卷气十足 温和又有主见
    清新 像清晨的微风 让人眼前一亮 自然不做作
    休闲 轻松自在没有负担 随意又不随便 周末出门刚刚好
    甜美 满满的少女心 俏皮又可爱 笑起来更动人
    优雅 举手投足都有气质 端庄又大方 从容又得体
    街头 个性张扬 酷劲十足 走到哪里都是焦点
    学院 青春洋溢 一秒回到校园时光 斯文又减龄
    运动 活力满满 动起来毫不拘束 朝气蓬勃
    民族 异域风情浓郁 手工感很足 花纹里都是故事
家居风格 风格 {v}风
    走的是{v}路线，{e} {v}的风格{e} 一派{v}气息，{e}
    简约 放在哪里都和谐 没有多余的线条 干净利落
    复古 像外婆家的老物件 藏着旧时光的情调 越用越有味道
    北欧 清冷里透着温暖 让屋子显得更敞亮 线条明快
    日式 安静又克制 处处都是禅意 朴素得让人安心
    田园 仿佛住进了小院 满是花草的香气 质朴亲切
    工业 硬朗又有个性 粗粝得恰到好处 很有腔调
    清新 让人眼前一亮 像清晨的微风 看着就舒心
图案 图案 {v}
    {v}图案{e} 点缀着{v}，{e} {v}元素{e} 表面的{v}{e}
    条纹 拉长了线条 经典又有节奏感 简单却不单调
    格子 英伦味道很浓 规整里透着俏皮 怎么看都不腻
    碎花 像把花园带在身边 浪漫又灵动 满是春日气息
    波点 活泼跳跃 可爱又减龄 增添不少趣味
    刺绣 针脚细密精致 立体又生动 一针一线都是心思
    卡通 童趣十足 看一眼就想笑 大人小孩都喜欢
    几何 拼出了设计感 现代感很强 利落又别致
    字母 潮味十足 个性十足 打破了沉闷
    渐变 像晚霞慢慢晕开 层次丰富 过渡自然柔和
    印花 色彩饱满不易褪 让画面热闹起来 醒目又别致
    树叶 把森林搬到眼前 脉络清晰可见 带来一丝凉意
布料 材质 {v}
    选用{v}面料，{e} {v}材质{e} 以{v}制成，{e} {v}的手感{e}
    纯棉 亲肤又吸汗 柔软不扎人 贴身也很舒服
    亚麻 透气又凉爽 自带自然的褶皱 越洗越柔软
    雪纺 轻盈飘逸 走动时仙气十足 薄而不透
    真丝 顺滑如水 泛着细腻的光泽 贵气又凉快
    羊毛 保暖又轻软 冬天也不怕冷 厚实却不臃肿
    牛仔 结实耐磨 挺括有型 怎么穿都不过时
    针织 弹性十足 柔软贴合 松软又舒适
    灯芯绒 纹路清晰有质感 厚实挡风 摸上去暖暖的
    法兰绒 绒面细密 摸上去暖暖的 裹着就不想松手
床品布料 材质 {v}
    选用{v}面料，{e} {v}材质{e} 以{v}织成，{e}
    纯棉 亲肤又吸汗 柔软不扎人 裸睡也很舒服
    亚麻 透气又凉爽 自带自然的褶皱 越洗越柔软
    真丝 顺滑如水 泛着细腻的光泽 贵气又凉快
    法兰绒 绒面细密 摸上去暖暖的 裹着就不想松手
    竹纤维 清凉抑菌 吸水又透气 触感柔滑
鞋包材质 材质 {v}
    选用{v}，{e} {v}材质{e} 以{v}制成，{e}
    牛皮 纹理自然细腻 越用越有光泽 结实又有韧性
    帆布 轻便耐脏 结实又好打理 随性又耐用
    麂皮 触感柔软 绒面低调有品位 秋冬质感拉满
    网布 透气不闷 轻得几乎没有重量 速干又清爽
    尼龙 耐磨又防泼水 轻便好收纳 怎么折腾都不坏
器皿材质 材质 {v}
    选用{v}，{e} {v}材质{e} 以{v}打造，{e}
    陶瓷 釉面温润 健康又好清洗 手感细腻
    玻璃 通透见底 干净又卫生 冷热都不怕
    不锈钢 结实不生锈 经久耐用 摔不坏也不变形
    铸铁 厚重聚热 受热均匀 可以用上很多年
    钛合金 轻巧坚固 没有异味 出门带着也不累
家具材质 材质 {v}
    选用{v}，{e} {v}材质{e} 以{v}打造，{e}
    实木 纹理清晰自然 稳固又耐用 带着淡淡的木香
    竹制 清凉又环保 轻巧结实 质朴天然
    藤编 编织细密透气 坐看都是风景 轻便有韧性
    铝合金 轻便不生锈 坚固又耐看 线条硬朗
    布艺 柔软亲切 拆洗方便 让空间变得温暖
版型 版型 {v}
    {v}版型{e} 采用{v}剪裁，{e} {v}的轮廓{e}
    修身 勾勒出好身材 衬托腰线 贴合却不紧绷
    宽松 遮肉又舒服 活动毫无束缚 胖瘦都能穿
    直筒 线条流畅 修饰腿形 显得挺拔
    廓形 气场十足 撑起好比例 大气有型
    收腰 显出小蛮腰 比例更好看 轻松显高
裙长 裙长
    {v}的长度{e} {v}设计{e} 做成{v}，{e}
    短裙 露出纤细双腿 青春活泼 走路轻快
    中长裙 优雅不拖沓 遮住小粗腿 刚好盖过膝盖
    长裙 飘逸动人 垂到脚踝更显高挑 走起路来摇曳生姿
裤长 裤长
    {v}的长度{e} {v}设计{e} 做成{v}，{e}
    短裤 清凉一夏 露出大长腿 走路轻快
    九分裤 露出脚踝更显瘦 利落精神 配什么鞋都好看
    长裤 拉长腿部线条 稳重得体 挡风又保暖
领型 领型
    {v}设计{e} {v}的领口{e} 配上{v}，{e}
    圆领 舒适不勒脖 简单大方 温柔又减龄
    V领 拉长脖颈线条 显得脸小 露出好看的锁骨
    翻领 干练精神 增添几分英气 正式又帅气
    高领 护住脖子不怕风 叠穿也好看 保暖又显气质
    方领 露出好看的锁骨 带点宫廷味道 显得肩颈利落
    娃娃领 乖巧可爱 一下子年轻好几岁 甜得刚刚好
袖型 袖型
    {v}设计{e} {v}的样子{e} 搭配{v}，{e}
    短袖 清爽利落 露出小臂很精神 夏天不闷热
    长袖 挡风又防晒 冷热都能应付 得体大方
    泡泡袖 遮住手臂的肉 公主感十足 俏皮可爱
    喇叭袖 随手一抬都好看 飘逸灵动 修饰手臂线条
    灯笼袖 蓬松又有造型 复古味道很足 显得手腕纤细
    无袖 清凉无拘束 肩线更分明 炎炎夏日也从容
腰型 腰型
    {v}设计{e} {v}的处理{e} 配合{v}，{e}
    高腰 拉高腰线显腿长 小个子也能驾驭 藏住小肚子
    松紧腰 吃饱了也不勒 穿脱方便 腰围胖瘦都合适
    系带腰 随心调节松紧 收出好看的腰线 多一分飘逸
服饰细节 款式
    {v}细节，{e} 加入{v}，{e} 有{v}点缀，{e} 巧用{v}，{e}
    口袋 方便装下小物 实用又有型 插手的样子很帅
    纽扣 圆润精致 整齐排列很好看 细节处见用心
    拉链 顺滑不卡 穿脱更快 金属光泽很亮眼
    荷叶边 层层叠叠很浪漫 走动时像波浪 柔美又灵动
    流苏 随步伐轻轻摇摆 洒脱不羁 平添几分风情
    蝴蝶结 甜美加分 像等人拆开的礼物 俏皮又精致
    开叉 若隐若现很迷人 迈步更轻松 显出修长小腿
    拼接 打破沉闷 撞出了层次 独特不易撞衫
    绑带 随心调节松紧 多一点小心机 牢固又有型
鞋功能 功能
    {v}性能出众，{e} 讲究{v}，{e} {v}做得很到位，{e}
    防滑 雨天也走得稳 上下楼梯更安心 抓地牢固
    减震 久走不累脚 落地像踩在云上 保护膝盖
    透气 一整天不闷脚 夏天也干爽 告别汗脚
    轻便 像没穿鞋一样 走远路也不累 说走就走
包功能 功能
    {v}设计很贴心，{e} 讲究{v}，{e} {v}做得很到位，{e}
    大容量 装得下一天所需 电脑雨伞都放得进 出差也够用
    防泼水 小雨天不用担心 擦一擦就干净 保护里面的东西
    多隔层 东西分门别类 找东西不用翻 手机钥匙各有位置
    减负 背久了也不酸 肩带宽厚柔软 重量分散均匀
灯功能 功能
    {v}功能很实用，{e} 支持{v}，{e} {v}做得很到位，{e}
    护眼 光线柔和不闪 孩子写作业更放心 看书久了也不累
    调光 明暗随心切换 从读书到入睡都合适 轻轻一转就好
    充电 拔了线也能亮 停电也不慌 移到哪里都方便
    声控 拍拍手就亮 起夜不用摸黑 老人也会用
杯功能 功能
    {v}性能出众，{e} 讲究{v}，{e} {v}做得很到位，{e}
    保温 早上的热水晚上还烫 冬天也能喝口热的 冰饮也能凉一天
    防漏 倒过来也滴水不漏 放进包里很安心 开车也不怕洒
    防烫 握着不烧手 孩子用也放心 热茶端得稳
    易清洗 一冲就干净 不留茶垢 杯口宽敞好刷
椅功能 功能
    {v}设计很贴心，{e} 支持{v}，{e} {v}做得很到位，{e}
    折叠 不用时靠墙就好 小户型也放得下 搬家带走也轻松
    升降 高矮随心调节 大人小孩都能坐 配什么桌子都合适
    护腰 久坐也不酸 贴合脊背曲线 加班也能挺直背
    承重 稳稳当当不摇晃 再胖也坐得安心 结实可靠
锅功能 功能
    {v}性能出众，{e} 讲究{v}，{e} {v}做得很到位，{e}
    不粘 煎蛋一滑就出锅 少油也不糊底 洗锅只要一分钟
    聚热 小火也能烧开 省时又省气 炖肉更软烂
    少油烟 厨房不再呛人 炒完菜灶台还干净 做饭也能美美的
    通用 燃气电磁炉都能用 换了灶具也不愁 露营生火也行
耳机功能 功能
    {v}功能很实用，{e} 主打{v}，{e} {v}做得很到位，{e}
    降噪 地铁里也能安静听歌 世界一下子清净了 专心做自己的事
    长续航 充一次用好几天 长途旅行也够用 不再半路没电
    低延迟 打游戏声画同步 看剧口型对得上 反应快人一步
    防水 跑步出汗也不怕 淋了小雨照样响 冲一冲就干净
伞功能 功能
    {v}性能出众，{e} 讲究{v}，{e} {v}做得很到位，{e}
    抗风 大风也吹不翻 骨架稳稳撑住 台风天也有底气
    防晒 烈日下也清凉 皮肤不再晒红 挡住刺眼的光
    速干 甩一甩就收好 不会弄湿背包 进门不滴水
    自动 一按就开 单手也能操作 上下车不再狼狈
表功能 功能
    {v}功能很实用，{e} 支持{v}，{e} {v}做得很到位，{e}
    防水 洗手游泳都不用摘 下雨也照戴 夏天出汗也不怕
    夜光 黑暗里也看得清 半夜醒来知道时辰 走夜路很方便
    计时 跑步煮茶都用得上 分秒都不差 训练更有数
    日历 低头就知道几号 不再忘记纪念日 开会更从容
巾功能 功能
    {v}性能出众，{e} 讲究{v}，{e} {v}做得很到位，{e}
    吸水 轻轻一擦就干 洗完头不滴水 一条顶两条
    速干 晾一会儿就能用 梅雨天也没异味 出差带着方便
    抑菌 用久了也没异味 宝宝也能放心用 干净看得见
    不掉毛 擦完脸上清清爽爽 洗多少次都平整 深色衣服也不沾
场合 场合
    {v}时有它，{e} {v}的日子里{e} 很适合{v}，{e}
    通勤 体面又省心 每天都有好状态 应付自如
    约会 悄悄加分 让人多看两眼 留下好印象
    旅行 轻装上路 拍照也好看 一路都安心
    居家 自在又放松 处处是小幸福 慢下来享受
    聚会 成为话题中心 轻松出彩 谁见了都问在哪买
    露营 和山野很搭 方便又好用 看星星也不将就
    送礼 体面又贴心 对方一定喜欢 心意看得见
季节 季节
    {v}里{e} 特别为{v}准备，{e} {v}正当时，{e}
    春天 和花一起醒来 迎着暖风出门 轻快又明媚
    夏天 带来一丝清凉 再热也有好心情 清清爽爽
    秋天 和落叶很相配 多了一层温柔 不冷不热刚刚好
    冬天 给你满满的暖意 下雪也不怕 像抱着小火炉
人群 人群
    很懂{v}的心思，{e} 送给{v}，{e} {v}也说好，{e}
    学生 价格也友好 陪伴每个学期 好看又好用
    上班族 忙碌里也有讲究 省心又省力 每天都用得上
    妈妈 省下不少力气 贴心又周到 温柔对待辛苦的人
    孩子 安全又有趣 放心交到小手里 一用就爱上
    父亲 稳重又实在 朴实里有心意 用着踏实
"""
# A kind in blocks: its name, measure word and nouns; its form's key and forms; its group of phrases and its pools.
KIND_TABLE = """
裙 条 裙子 小裙子
    裙型 百褶裙 A字裙 半身裙 吊带裙 连衣裙 鱼尾裙 伞裙 背带裙
    穿 颜色 服饰风格 图案 布料 版型 服饰细节 场合 季节 裙长 领型 袖型 腰型
上衣 件 上衣
    衣样式 衬衫 卫衣 毛衣 外套 风衣 马甲 西装 开衫
    穿 颜色 服饰风格 图案 布料 版型 服饰细节 场合 季节 领型 袖型
裤 条 裤子
    裤型 阔腿裤 哈伦裤 工装裤 小脚裤 背带裤 喇叭裤
    穿 颜色 服饰风格 图案 布料 版型 服饰细节 场合 季节 裤长 腰型
鞋 双 鞋子
    鞋款式 小白鞋 乐福鞋 跑步鞋 短靴 凉鞋 玛丽珍鞋
    穿 颜色 服饰风格 鞋包材质 鞋功能 服饰细节 场合 季节 人群
包 只 包包
    包款式 双肩包 斜挎包 托特包 手提包 腰包 水桶包
    带 颜色 服饰风格 图案 鞋包材质 包功能 场合 人群
帽 顶 帽子
    帽款式 渔夫帽 棒球帽 贝雷帽 草帽 毛线帽
    带 颜色 服饰风格 图案 场合 季节 人群
围巾 条 围巾
    围巾款式 长围巾 小方巾 披肩
    带 颜色 服饰风格 图案 布料 场合 人群
伞 把 雨伞
    伞款式 折叠伞 长柄伞 口袋伞 儿童伞
    带 颜色 服饰风格 图案 伞功能 人群
手表 块 手表
    表款式 机械表 石英表 电子表
    带 颜色 服饰风格 表功能 场合 人群
耳机 副 耳机
    耳机款式 头戴耳机 蓝牙耳机 入耳耳机
    带 颜色 服饰风格 耳机功能 场合 人群
床品 套 床品
    床品款式 四件套 被套 枕套
    家 颜色 家居风格 图案 床品布料 季节 人群
毛巾 条 毛巾
    巾款式 浴巾 面巾 运动巾
    家 颜色 图案 床品布料 巾功能 人群
灯 盏 灯
    灯款式 台灯 落地灯 小夜灯 壁灯 吊灯
    家 颜色 家居风格 家具材质 灯功能 人群
杯 只 杯子
    杯款式 马克杯 茶杯 随行杯 咖啡杯
    家 颜色 家居风格 图案 器皿材质 杯功能 场合 人群
椅 把 椅子
    椅款式 餐椅 躺椅 书桌椅 摇椅
    家 颜色 家居风格 家具材质 椅功能 人群
锅 口 锅
    锅款式 炒锅 汤锅 奶锅 煎锅
    家 颜色 家居风格 器皿材质 锅功能 人群
"""


def read_blocks(table: str) -> list[list[list[str]]]:
    """The words of every line of every block; a line that is not indented begins one."""
    return [[line.split() for line in block.splitlines()] for block in re.split(r"\n(?! )", table.strip())]


POOLS = {
    name: Pool(key, tuple(templates), {value: tuple(effects) for value, *effects in values}, *modifier)
    for (name, key, *modifier), templates, *values in read_blocks(POOL_TABLE)
}
KINDS = {
    name: Kind(measure, tuple(nouns), form_key, tuple(forms), tuple(pools), group)
    for (name, measure, *nouns), (form_key, *forms), (group, *pools) in read_blocks(KIND_TABLE)
}

# A group of phrases in blocks: its name; how an advert opens; how it closes. 通用 goes with every kind.
# {n} is the noun with its measure word and, at times, one attribute before it: 条白色百褶裙.
PHRASE_TABLE = """
通用
    这{n}很有心意 这{n}值得细细打量 想换个心情，不妨试试这{n} 一{n}，让平淡的日子亮起来 第一眼就喜欢上了这{n} 别小看这{n} 好东西不必多，一{n}就够了
    喜欢就带回家吧 用过的人都说值 早一天拥有，早一天开心 自用送人两相宜 细节处处都是诚意 让生活多一点讲究 这份用心你一定看得见
穿
    这{n}一上身就让人喜欢 衣橱里缺的正是这{n} 还在为穿搭发愁吗？这{n}来帮你 出门前换上这{n}
    轻松穿出好气质 怎么搭都好看 走在街上回头率很高 穿上它自信满满 从早到晚都舒服
带
    出门带上这{n} 每天都离不开这{n} 还在找合心意的随身好物吗？看看这{n} 随手带走的这{n}
    走到哪里都顺手 陪你走过每一天 小小一件很出彩 放在身边就安心
家
    给家里添上这{n} 日子过得好，少不了这{n} 推开门就看见这{n} 还在找顺手的家居好物吗？看看这{n}
    家的味道更浓了 让小家更有温度 日日相见也不厌 一家人都用得上
"""
PHRASES = {group: (openings, closings) for (group,), openings, closings in read_blocks(PHRASE_TABLE)}
ENDINGS = "这{n}值得拥有 有了这{n}就够了 这样一{n}谁能不爱 说的正是这{n} 这{n}从不让人失望 好处都在这{n}里了".split()

# What does not go together, so that no row praises wool in summer or the sleeves of a waistcoat.
CONFLICTS = (
    ({"夏天"}, {"羊毛", "灯芯绒", "法兰绒", "高领", "长袖", "毛衣", "毛线帽", "短靴", "麂皮", "外套", "风衣"}),
    ({"冬天"}, {"雪纺", "无袖", "短袖", "短裤", "凉鞋", "草帽", "亚麻", "真丝", "竹纤维", "网布", "透气", "吊带裙"}),
    ({"百褶裙", "A字裙", "半身裙", "吊带裙", "鱼尾裙", "伞裙", "背带裙", "马甲"}, {"领型", "袖型"}),
    ({"风衣", "西装", "毛衣", "外套", "衬衫", "开衫"}, {"短袖", "无袖", "圆领", "方领", "娃娃领"}),
    ({"高领"}, {"衬衫", "西装", "外套", "风衣", "开衫"}),
    ({"毛衣"}, {"牛仔", "雪纺", "真丝", "灯芯绒", "法兰绒", "亚麻", "翻领"}),
    ({"西装", "风衣"}, {"针织", "雪纺", "卡通", "运动", "碎花", "法兰绒"}),
    ({"短裤"}, {"阔腿裤", "哈伦裤", "小脚裤", "喇叭裤", "工装裤", "羊毛", "法兰绒"}),
    ({"阔腿裤", "哈伦裤"}, {"修身", "直筒"}),
    ({"小脚裤"}, {"宽松", "直筒", "廓形"}),
    ({"喇叭裤"}, {"直筒", "宽松"}),
    ({"鱼尾裙", "吊带裙"}, {"廓形", "宽松"}),
    ({"上衣", "鞋", "裤"}, {"开叉"}),
    ({"上衣"}, {"直筒"}),
    ({"裤"}, {"收腰", "荷叶边"}),
    ({"鞋"}, {"口袋", "纽扣", "荷叶边"}),
    ({"围巾"}, {"牛仔", "灯芯绒", "运动"}),
    ({"儿童伞"}, {"父亲", "妈妈", "上班族", "学生"}),
    ({"父亲"}, {"甜美", "学院", "街头", "卡通", "粉色", "少油烟"}),
    ({"孩子"}, {"机械表", "降噪", "优雅"}),
    ({"杯"}, {"铸铁"}),
    ({"炒锅", "煎锅"}, {"玻璃"}),
    ({"吊灯", "壁灯"}, {"充电", "布艺"}),
    ({"耳机", "手表"}, {"民族", "居家"}),
    ({"跑步鞋"}, {"牛皮", "麂皮", "优雅", "甜美"}),
)


@dataclass(frozen=True)
class Product:
    """One thing to advertise: its kind, its form ("" where it has none) and the pools with the values drawn."""

    kind: str
    form: str
    attributes: tuple[tuple[str, str], ...]  # (name of the pool, value)

    def pairs(self) -> list[tuple[str, str]]:
        """Key and value of every attribute, in the order ADGEN writes them: type first, form last."""
        form = [(KINDS[self.kind].form_key, self.form)] if self.form else []
        return [("类型", self.kind), *((POOLS[pool].key, value) for pool, value in self.attributes), *form]

    def content(self) -> str:
        """The prompt side of a row: 类型#裙*颜色#白色*裙型#百褶裙."""
        return "*".join(f"{key}#{value}" for key, value in self.pairs())


def draw_product(rng: random.Random) -> Product:
    """Draw a product whose kind, form and attributes go together."""
    while True:
        name = rng.choice(list(KINDS))
        kind = KINDS[name]
        form = rng.choice(kind.forms) if rng.random() < 0.75 else ""
        chosen = sorted(rng.sample(range(len(kind.pools)), rng.choice((2, 3, 3, 4))))
        attributes = tuple((kind.pools[i], rng.choice(list(POOLS[kind.pools[i]].values))) for i in chosen)
        words = {name, form, *(word for attribute in attributes for word in attribute)}
        if not any(words & left and words & right for left, right in CONFLICTS):
            return Product(name, form, attributes)


def write_advert(product: Product, rng: random.Random) -> str:
    """One or two sentences of advertising copy that name every attribute value of the product."""
    kind = KINDS[product.kind]
    attributes = list(product.attributes)
    modifier = ""
    modifying = [attribute for attribute in attributes if POOLS[attribute[0]].modifier]
    if modifying and rng.random() < 0.4:
        merged = rng.choice(modifying)
        attributes.remove(merged)
        modifier = POOLS[merged[0]].modifier.format(v=merged[1])
    noun = kind.measure + modifier + (product.form or rng.choice(kind.nouns))
    if rng.random() < 0.25:
        rng.shuffle(attributes)
    clauses = []
    for pool, value in attributes:
        effect = rng.choice(POOLS[pool].values[value])
        clauses.append(rng.choice(POOLS[pool].templates).format(v=value, e=effect))
    for i in range(1, len(clauses)):
        if rng.random() < 0.15:
            clauses[i] = rng.choice(("而且", "同时", "更难得的是，")) + clauses[i]

    plan = rng.random()
    if plan < 0.25 and len(clauses) > 1:  # the attributes first, the product as the punch line
        return "，".join(clauses) + rng.choice(("，", "。")) + rng.choice(ENDINGS).format(n=noun) + rng.choice("。！")
    openings, closings = map(operator.add, PHRASES["通用"], PHRASES[kind.group])
    opening = rng.choice(openings).format(n=noun)
    split = rng.randrange(len(clauses))  # clauses that stay in the first sentence
    first = "，".join([opening, *clauses[:split]]) + (rng.choice("。！") if split == 0 else "。")
    rest = clauses[split:]
    if plan < 0.8:
        rest.append(rng.choice(closings))
    return first + "，".join(rest) + rng.choice("。。。！")


def draw_row(rng: random.Random) -> tuple[Product, str]:
    """A product and an advert of MIN_CHARACTERS to MAX_CHARACTERS for it."""
    while True:
        product = draw_product(rng)
        advert = write_advert(product, rng)
        if MIN_CHARACTERS <= len(advert) <= MAX_CHARACTERS:
            return product, advert


def sample_rows() -> list[dict[str, str]]:
    """All rows, training rows first; no two have the same content or the same summary."""
    rng = random.Random(SEED)
    rows: dict[str, str] = {}
    summaries: set[str] = set()
    while len(rows) < TRAIN_ROWS + DEV_ROWS:
        product, advert = draw_row(rng)
        if product.content() not in rows and advert not in summaries:
            rows[product.content()] = advert
            summaries.add(advert)
    return [{"content": content, "summary": summary} for content, summary in rows.items()]


def write_rows(file: Path, rows: list[dict]) -> None:
    """Write one JSON object a line, UTF-8."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8", newline="\n")


def main(folder: Path = SAMPLE_FOLDER) -> None:
    rows = sample_rows()
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.json", rows[:TRAIN_ROWS])
    write_rows(folder / "dev.json", rows[TRAIN_ROWS:])


if __name__ == "__main__":
    main()
